"""Completions are decoded behind the engine's loop, and leave it in the order their rows ended."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from inference.backends.row import Row
from inference.build_engine import build_engine
from inference.finishing import Finishing
from inference.sampling import SamplingParams
from inference.sequence import Completion, Sequence
from tests.paged_cases import make_row, settings_of
from tests.plain_kernels import plain_model_sampled_by_kernels
from tests.processes import wait_for

WAIT_S = 60


def sequence(seq_id: int, max_tokens: int) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Sequence(seq_id, [1, 2, 3], sampling, draw_seed=seq_id)


def finished_row(seq_id: int, decode: Callable[..., str]) -> Row:
    row = replace(make_row(sequence(seq_id, 2)), decode=decode)
    row.token_ids, row.finish_reason = [7, 8], "length"
    return row


@pytest.mark.parametrize("is_async", [True, False])
def test_completions_leave_in_the_order_their_rows_came(is_async: bool) -> None:
    finishing = Finishing(is_async=is_async)
    for seq_id in (5, 3, 9):
        finishing.put(finished_row(seq_id, lambda ids: "x" * len(ids)), num_cached_tokens=seq_id)
    assert (len(finishing), list(finishing)) == (3, [5, 3, 9])
    completions = finishing.take(wait=True)
    assert [(c.seq_id, c.text, c.num_cached_tokens) for c in completions] == [
        (5, "xx", 5),
        (3, "xx", 3),
        (9, "xx", 9),
    ]
    assert len(finishing) == 0


def test_what_decoding_raises_is_raised_where_the_completion_would_be_taken() -> None:
    def decode(ids: object) -> str:
        raise OverflowError("out of range integral type conversion attempted")

    finishing = Finishing(is_async=True)
    finishing.put(finished_row(0, decode), num_cached_tokens=0)
    with pytest.raises(OverflowError):
        finishing.take(wait=True)


def test_steps_go_on_while_a_completion_is_decoded() -> None:
    may_decode = threading.Event()

    def decode(ids: object) -> str:
        assert may_decode.wait(WAIT_S), "the engine waited for a completion's text"
        return "decoded"

    engine, _, _ = build_engine(
        plain_model_sampled_by_kernels("qwen3"),
        settings_of(),
        lambda sequence: replace(make_row(sequence), decode=decode),
    )
    engine.submit([sequence(0, 1), sequence(1, 12)])
    early = [completion for _ in range(10) for completion in engine.step()]
    assert (early, engine.num_unfinished, set(engine.seq_ids)) == ([], 2, {0, 1})
    assert engine.stats.num_completion_tokens == 1  # the first has ended
    assert not engine.is_idle
    later: list[Completion] = []

    def finish() -> None:
        while engine.num_unfinished:
            later.extend(engine.step())

    finishing = threading.Thread(target=finish)
    finishing.start()
    wait_for(lambda: engine.is_idle, timeout_s=WAIT_S, what="the last token")
    # Ranks must agree on it, so it does not hang on how far a thread has come.
    assert engine.num_unfinished
    may_decode.set()
    finishing.join()
    assert [(c.seq_id, len(c.token_ids), c.text) for c in later] == [
        (0, 1, "decoded"),
        (1, 12, "decoded"),
    ]
