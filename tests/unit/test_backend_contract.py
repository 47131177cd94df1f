"""What every backend promises, tried on every backend. A new backend joins by its name in `BACKENDS`."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

from inference.backends import Backend, create_backend
from inference.backends.checks import check_sequences
from inference.config import EngineConfig
from inference.sampling import SamplingParams
from inference.sequence import Completion, Sequence

BACKENDS = (
    "dummy",
    "transformers",
    "paged",
    pytest.param(
        "zero",
        marks=pytest.mark.skipif(
            find_spec("deepspeed") is None, reason="deepspeed is not installed"
        ),
    ),
)
MODEL = Path(__file__).parents[1] / "data" / "models" / "tiny-a"

Make = Callable[..., Backend]


@pytest.fixture(params=BACKENDS)
def make(request: pytest.FixtureRequest) -> Iterable[Make]:
    made: list[Backend] = []

    def build(**knobs: object) -> Backend:
        backend = create_backend(EngineConfig(model=str(MODEL), backend=request.param, **knobs))
        made.append(backend)
        return backend

    yield build
    for backend in made:
        backend.close()


def prompt(i: int) -> list[int]:
    """Prompts of 1 to 30 tokens, in no order, that every vocabulary here has."""
    return [3 + (7 * i + 11 * k) % 250 for k in range(1 + (17 * i) % 30)]


def sequences(
    ids: Iterable[int], sampling: SamplingParams | None = None, draw_seed: int | None = None
) -> list[Sequence]:
    sampling = sampling or SamplingParams(max_tokens=8)
    return [Sequence(i, prompt(i), sampling, i if draw_seed is None else draw_seed) for i in ids]


def drain(backend: Backend) -> dict[int, Completion]:
    found: dict[int, Completion] = {}
    while backend.num_unfinished:
        for completion in backend.step():
            assert completion.seq_id not in found
            found[completion.seq_id] = completion
    return found


def run(backend: Backend, given: Iterable[Sequence]) -> dict[int, Completion]:
    backend.submit(given)
    return drain(backend)


def without_id(completion: Completion) -> tuple[object, ...]:
    return completion.token_ids, completion.text, completion.finish_reason, completion.error


def test_every_sequence_comes_back_once(make):
    backend = make(max_num_seqs=4)
    backend.submit(sequences(range(21)))
    assert backend.num_unfinished == 21
    found = drain(backend)
    assert sorted(found) == list(range(21))
    assert (backend.num_unfinished, backend.num_waiting) == (0, 0)


def test_an_idle_backend_steps_to_nothing(make):
    backend = make()
    assert backend.step() == []
    run(backend, sequences([1]))
    assert backend.step() == []


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_batch_size_and_order_change_nothing(make, temperature):
    sampling = SamplingParams(max_tokens=8, temperature=temperature)
    alone = run(make(max_num_seqs=1), sequences(range(24), sampling))
    for size in (3, 8, 24):
        assert run(make(max_num_seqs=size), sequences(reversed(range(24)), sampling)) == alone


def test_sequences_may_arrive_while_others_run(make):
    backend = make(max_num_seqs=2)
    expected = run(make(), sequences(range(9)))
    backend.submit(sequences(range(5)))
    found = {c.seq_id: c for _ in range(3) for c in backend.step()}
    backend.submit(iter(sequences(range(5, 9))))
    assert backend.num_unfinished == 9 - len(found)
    assert {**found, **drain(backend)} == expected


def test_waiting_counts_what_has_not_started(make):
    backend = make(max_num_seqs=2)
    backend.submit(sequences(range(6), SamplingParams(max_tokens=8, ignore_eos=True)))
    assert backend.num_waiting == 6
    backend.step()
    assert backend.num_waiting == 4


def test_max_tokens_is_the_most_and_length_says_so(make):
    for completion in run(make(), sequences(range(12), SamplingParams(max_tokens=5))).values():
        assert len(completion.token_ids) <= 5
        assert (completion.finish_reason == "length") == (len(completion.token_ids) == 5)
    endless = SamplingParams(max_tokens=40, ignore_eos=True)
    for completion in run(make(), sequences(range(12), endless)).values():
        assert (len(completion.token_ids), completion.finish_reason) == (40, "length")


def test_max_tokens_differs_per_sequence(make):
    given = [
        Sequence(i, prompt(3), SamplingParams(max_tokens=1 + i, ignore_eos=True)) for i in range(9)
    ]
    found = run(make(max_num_seqs=4), given)
    longest = found[8].token_ids
    assert all(found[i].token_ids == longest[: 1 + i] for i in range(9))


def test_max_model_len_bounds_prompt_and_completion(make):
    backend = make(max_model_len=32)
    assert backend.info.max_model_len == 32
    sampling = SamplingParams(max_tokens=100, ignore_eos=True)
    found = run(backend, [Sequence(0, [5] * 30, sampling), Sequence(1, [5] * 31, sampling)])
    assert [len(found[i].token_ids) for i in (0, 1)] == [2, 1]
    assert {c.finish_reason for c in found.values()} == {"length"}


@pytest.mark.parametrize(
    ("token_ids", "words"), [([], "empty"), ([5] * 32, "max_model_len"), ([5] * 99, "99")]
)
def test_a_prompt_that_cannot_run_is_refused(make, token_ids, words):
    backend = make(max_model_len=32)
    with pytest.raises(ValueError, match=words):
        backend.submit([Sequence(7, token_ids)])
    assert backend.num_unfinished == 0


class _OnlyAsked:
    """The unfinished numbers, which can be asked for one and not walked over or copied."""

    def __contains__(self, seq_id: object) -> bool:
        return seq_id == 7


def test_submitting_costs_the_same_however_many_are_unfinished():
    assert len(check_sequences(sequences(range(5)), _OnlyAsked(), 100)) == 5
    for given in ([6, 7], [6, 6]):
        with pytest.raises(ValueError, match=f"seq_id {given[-1]} is already in use"):
            check_sequences(sequences(given), _OnlyAsked(), 100)


def test_a_seq_id_is_free_again_only_when_returned(make):
    backend = make()
    backend.submit(sequences([4]))
    with pytest.raises(ValueError, match="seq_id 4 is already in use"):
        backend.submit(sequences([4]))
    first = drain(backend)
    assert run(backend, sequences([4])) == first


def test_draws_follow_the_draw_seed_and_nothing_else(make):
    sampling = SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True)
    one = run(make(max_num_seqs=3), sequences(range(6), sampling, draw_seed=1 << 63))
    again = run(make(max_num_seqs=6), sequences(range(6), sampling, draw_seed=1 << 63))
    other = run(make(max_num_seqs=3), sequences(range(6), sampling, draw_seed=2))
    assert one == again
    assert all(one[i].token_ids != other[i].token_ids for i in one)


def test_greedy_ignores_the_draw_seed(make):
    one = run(make(), sequences(range(6), draw_seed=1))
    assert one == run(make(), sequences(range(6), draw_seed=2))


def endless(**fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=12, ignore_eos=True, **fields)


def test_text_is_cut_before_a_stop_string_and_nothing_is_lost(make):
    backend = make(max_num_seqs=5)
    whole = run(backend, sequences(range(12), endless()))
    stops = {i: completion.text[3:6] for i, completion in whole.items()}
    given = [Sequence(i, prompt(i), endless(stop=("\0never", stops[i]))) for i in whole]
    for i, stopped in run(backend, given).items():
        assert stopped.finish_reason == "stop"
        assert stopped.text == whole[i].text[: whole[i].text.find(stops[i])]
        assert stopped.token_ids == whole[i].token_ids[: len(stopped.token_ids)]


def test_a_stop_token_ends_the_completion_and_is_not_part_of_it(make):
    backend = make(max_num_seqs=5)
    whole = run(backend, sequences(range(12), endless()))
    stops = {i: completion.token_ids[5] for i, completion in whole.items()}
    given = [Sequence(i, prompt(i), endless(stop_token_ids=(stops[i],))) for i in whole]
    for i, stopped in run(backend, given).items():
        assert stopped.finish_reason == "stop"
        assert stopped.token_ids == whole[i].token_ids[: whole[i].token_ids.index(stops[i])]
        assert whole[i].text.startswith(stopped.text)


def test_min_tokens_holds_every_kind_of_stop_back(make):
    backend = make(max_num_seqs=5)
    given = []
    for i, completion in run(backend, sequences(range(12), endless())).items():
        sampling = SamplingParams(
            max_tokens=12,
            min_tokens=9,
            stop=(completion.text[0],),
            stop_token_ids=(completion.token_ids[0],),
        )
        given.append(Sequence(i, prompt(i), sampling))
    for completion in run(backend, given).values():
        assert 9 <= len(completion.token_ids) <= 12


def test_logprobs_come_for_every_token_when_asked_for(make):
    found = run(make(), sequences(range(8), SamplingParams(max_tokens=6, logprobs=3)))
    for completion in found.values():
        assert completion.logprobs is not None
        assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
        for entry in completion.logprobs:
            values = [logprob for _, logprob in entry.top]
            assert len(values) == 3
            assert values == sorted(values, reverse=True)
            assert 0 >= values[0] >= entry.logprob - 1e-6
    assert all(c.logprobs is None for c in run(make(), sequences(range(3))).values())


def test_stats_add_up(make):
    backend = make(max_num_seqs=3)
    stats = backend.stats
    found = run(backend, sequences(range(10)))
    assert backend.stats is stats
    assert stats.num_prompt_tokens == sum(len(prompt(i)) for i in range(10))
    assert stats.num_completion_tokens == sum(len(c.token_ids) for c in found.values())
    assert stats.num_steps > 0


def test_info_says_what_was_built(make, request):
    info = make(max_num_seqs=5, max_model_len=64).info
    assert info.backend == request.node.callspec.params["make"]
    assert (info.max_num_seqs, info.max_model_len) == (5, 64)


def test_text_is_always_valid_utf8(make):
    sampling = SamplingParams(max_tokens=20, temperature=5.0, ignore_eos=True)
    for completion in run(make(), sequences(range(10), sampling)).values():
        assert completion.text.encode("utf-8").decode("utf-8") == completion.text


def test_closing_twice_is_safe_and_forgets_everything(make):
    backend = make(max_num_seqs=2)
    backend.submit(sequences(range(4)))
    backend.step()
    backend.close()
    backend.close()
    assert (backend.num_unfinished, backend.num_waiting) == (0, 0)
