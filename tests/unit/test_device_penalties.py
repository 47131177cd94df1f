"""Penalties and bans on the device give the reference sampler's tokens; in Triton's interpreter without a GPU."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed: kernels are not tested here")

from inference.build_engine import build_engine
from inference.kernels import device_sampler
from inference.sampler import SamplerRow, sample
from inference.sampling import SamplingParams
from inference.sequence import Sequence
from inference.slot_params import STOPPED, SlotParams
from inference.tally import MAX_TOKENS, TokenTally
from inference.vocabulary import WholeVocabulary
from tests.paged_cases import (
    END_TOKEN_IDS,
    expect_too_little,
    make_endless_row,
    model_of,
    prompts_of,
    reference,
    run,
    sequences_of,
    settings_of,
    tokens,
)
from tests.plain_kernels import plain_model_sampled_by_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
in_host_memory = pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/gpu has it on the card")


class Slots:
    """Slots with what the device keeps of them."""

    def __init__(self, num_slots: int, vocab: int, **options: Any) -> None:
        self.tally = TokenTally(num_slots, WholeVocabulary(vocab), DEVICE, **options)
        self.params = SlotParams(num_slots, DEVICE, self.tally)
        self.last_token = torch.full((num_slots,), -5, dtype=torch.int32, device=DEVICE)

    def start(self, slot: int, row: SamplerRow) -> None:
        assert self.params.is_fast(slot, row)
        self.params.write(slot, row)

    def choose(self, logits: torch.Tensor, slots: list[int], rows: list[SamplerRow]) -> list[int]:
        """Sample one token a row, -1 for none; the rows' ends are not marked."""

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        result = ints([-5] * len(rows))
        device_sampler.sample(
            logits.clone(),
            ints(slots),
            ints([len(row.token_ids) for row in rows]),
            ints([0, 0, len(rows), 0, 0, 0, 0, 0]),
            self.params.on_device,
            self.last_token,
            result,
            has_draws=self.params.has_draws,
            has_floors=self.params.has_floors,
            has_bans=self.params.has_bans,
            tally=self.tally.table if self.params.has_penalties else None,
        )
        return [token if token < 0 else token & (STOPPED - 1) for token in result.tolist()]


SAMPLINGS = [
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(),
    SamplingParams(frequency_penalty=0.7, presence_penalty=-0.4),
    SamplingParams(temperature=0.8, presence_penalty=1.5),
    SamplingParams(temperature=1.2),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5),
    SamplingParams(temperature=1.5, top_p=0.6, repetition_penalty=1.1, frequency_penalty=0.3),
    SamplingParams(temperature=1.0, min_p=0.2, repetition_penalty=0.8, min_tokens=3),
    SamplingParams(temperature=0.9, top_k=7),
    SamplingParams(min_tokens=2, presence_penalty=0.5),
    SamplingParams(temperature=1.0, min_tokens=3),
]


def favourites(rows: int, vocab: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Logits under which the same few tokens are chosen again and again; among them the end tokens 7 and 9."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator)
    logits[:, [3, 7, 9, 40, vocab - 1]] += 5
    return logits.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("samplings", [SAMPLINGS[:3], SAMPLINGS[:5], SAMPLINGS])
def test_a_history_that_grows_gives_the_references_tokens(samplings, dtype):
    vocab = 2101  # more than one part
    rows = [
        SamplerRow(
            sampling, 2**63 + 12345 * i, [1, 40, 9, 40, vocab + 7], [9, 40, 9][: i % 4], {7, 9}
        )
        for i, sampling in enumerate(samplings)
    ]
    slots = [(3 * i + 1) % (len(rows) + 2) for i in range(len(rows))]
    table = Slots(len(rows) + 2, vocab)
    for slot, row in zip(slots, rows, strict=True):
        table.start(slot, row)
    for step in range(5):
        if step == 3:  # preempted: everyone starts anew, one slot further
            slots = [(slot + 1) % (len(rows) + 2) for slot in slots]
            for slot, row in zip(slots, rows, strict=True):
                table.start(slot, row)
        logits = favourites(len(rows), vocab, dtype, seed=step)
        expected = sample(logits, rows).token_ids
        assert table.choose(logits, slots, rows) == expected
        for row, token in zip(rows, expected, strict=True):
            row.token_ids = [*row.token_ids, token]
    assert any(len(set(row.token_ids)) < len(row.token_ids) for row in rows)


SPECIAL = st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, -0.0])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.one_of(st.floats(-9, 9, width=32), SPECIAL), min_size=3, max_size=9),
    st.lists(st.integers(0, 10), max_size=6),
    st.lists(st.integers(0, 8), max_size=6),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7]),
        top_k=st.sampled_from([0, 0, 2]),
        top_p=st.sampled_from([1.0, 0.5]),
        repetition_penalty=st.one_of(st.just(1.0), st.floats(0.01, 100)),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
        min_tokens=st.integers(0, 6),
        stop_token_ids=st.sampled_from([(), (0,), (1, 2, 99)]),
        ignore_eos=st.booleans(),
    ),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_penalties_on_any_logits_give_the_references_token(
    values, prompt, so_far, sampling, dtype
):
    logits = torch.tensor([values, values], dtype=dtype, device=DEVICE)
    so_far = [token for token in so_far if token < len(values)]
    rows = [SamplerRow(sampling, 5, prompt, so_far, {1}), SamplerRow(SamplingParams(), 6, [1])]
    table = Slots(2, len(values))
    for slot, row in enumerate(rows):
        table.start(slot, row)
    with np.errstate(all="ignore"):  # the interpreter's numpy says so when it meets NaN
        assert table.choose(logits, [0, 1], rows) == sample(logits, rows).token_ids


@pytest.mark.parametrize("is_lower", [True, False])
def test_a_rows_scores_are_the_references_to_the_last_bit(is_lower):
    """An unseen token ties with what the seen one's score must be: the lower id wins, unless a bit is wrong."""
    seen, unseen = (4, 9) if is_lower else (9, 4)
    sampling = SamplingParams(
        repetition_penalty=1.1, frequency_penalty=0.37, presence_penalty=0.21, max_tokens=400
    )
    count = 150
    rows = [SamplerRow(sampling, i, [seen] * (i % 2), [seen] * (i % 97 + 1)) for i in range(count)]
    logits = torch.full((count, 12), -1e6)
    generator = torch.Generator().manual_seed(3)
    logits[:, seen] = torch.randn(count, generator=generator) * 20
    penalties = sampling.frequency_penalty * torch.tensor([len(r.token_ids) for r in rows])
    value = logits[:, seen]
    scaled = torch.where(value > 0, value / 1.1, value * 1.1)
    logits[:, unseen] = scaled - (penalties + sampling.presence_penalty)
    logits = logits.to(DEVICE)
    table = Slots(count, 12)
    for slot, row in enumerate(rows):
        table.start(slot, row)
    assert sample(logits, rows).token_ids == [4] * count
    assert table.choose(logits, list(range(count)), rows) == [4] * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_floors_lie_between_penalised_scores_that_differ_in_low_bits_only(sign, dtype):
    """Logits in bf16 that all have the same 16 bits or the next: what penalties take is far below their spacing."""
    vocab, num_rows = 64, 12
    logits = torch.full((num_rows, vocab), sign * 40.0, dtype=dtype, device=DEVICE)
    logits[:, ::5] = sign * 40.25
    rows = [
        SamplerRow(
            SamplingParams(
                temperature=3.0,
                frequency_penalty=0.001,
                presence_penalty=0.0005,
                **({"top_k": 3 + 5 * i} if i % 2 else {"top_p": 0.05 + 0.07 * i}),
            ),
            draw_seed,
            [1],
            [token for token in range(vocab) for _ in range(token * 7 % 11)],
        )
        for draw_seed in range(3)
        for i in range(num_rows // 3)
    ]
    table = Slots(num_rows, vocab)
    for slot, row in enumerate(rows):
        table.start(slot, row)
    assert table.choose(logits, list(range(num_rows)), rows) == sample(logits, rows).token_ids


def test_a_broken_logit_of_a_banned_token_still_breaks_its_row():
    logits = torch.zeros(3, 40, device=DEVICE)
    logits[0, 7], logits[1, 7], logits[2, 7] = math.nan, math.inf, 5.0
    sampling = SamplingParams(min_tokens=2)
    rows = [SamplerRow(sampling, 1, [1], [], {7}) for _ in range(3)]
    table = Slots(3, 40)
    for slot, row in enumerate(rows):
        table.start(slot, row)
    assert table.choose(logits, [0, 1, 2], rows) == [-1, -1, 0]


def test_rows_that_do_not_fit_the_tally_are_left_to_the_host():
    penalised = SamplerRow(SamplingParams(frequency_penalty=0.1), 1, [1])
    table = Slots(8, 1000, max_bytes=3 * 2 * 1000)
    assert [table.params.is_fast(slot, penalised) for slot in (0, 2, 3, 7)] == [True] * 2 + [
        False
    ] * 2
    assert table.params.is_fast(7, SamplerRow(SamplingParams(), 1, [1]))
    many = replace(penalised.sampling, max_tokens=MAX_TOKENS + 1)
    assert not table.params.is_fast(0, replace(penalised, sampling=many))
    only_presence = replace(many, frequency_penalty=0.0, presence_penalty=0.1)
    assert table.params.is_fast(0, replace(penalised, sampling=only_presence))
    table.params.write(3, penalised)
    assert not table.params.are_fast([0, 3])
    assert not table.params.has_penalties


def test_nothing_is_allocated_before_a_row_has_penalties():
    table = Slots(8, 1000)
    table.start(0, SamplerRow(SamplingParams(temperature=1.0, min_tokens=3), 1, [1]))
    assert table.tally.table.shape == (1, 1000)
    assert table.tally.num_bytes == 16_000
    table.start(1, SamplerRow(SamplingParams(presence_penalty=1.0), 1, [1]))
    assert table.tally.table.shape == (8, 1000)


def test_a_count_stays_at_its_most():
    table = Slots(1, 10)
    row = SamplerRow(
        SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, max_tokens=2**20),
        1,
        [4],
        [4] * (MAX_TOKENS - 1),
    )
    table.start(0, row)
    logits = torch.full((1, 10), -1e9, device=DEVICE)
    logits[0, 4] = 5.0
    for _ in range(3):
        assert table.choose(logits, [0], [row]) == [4]
        table.tally.count([0], [4])
    assert table.tally.table.tolist() == [[0, 0, 0, 0, -1, 0, 0, 0, 0, 0]]


def refuse(*args: Any) -> Any:
    raise AssertionError("the host sampled")


ENGINE_SAMPLINGS = [
    SamplingParams(max_tokens=14, temperature=0.8, presence_penalty=1.5, ignore_eos=True),
    SamplingParams(max_tokens=11, repetition_penalty=1.5, frequency_penalty=0.2, min_tokens=5),
    SamplingParams(max_tokens=9, ignore_eos=True),
    SamplingParams(max_tokens=16, temperature=0.9, top_k=9, min_tokens=8, presence_penalty=-0.5),
]


def engine_sequences(count: int) -> list[Sequence]:
    return [
        replace_sampling(sequence, ENGINE_SAMPLINGS[i % len(ENGINE_SAMPLINGS)])
        for i, sequence in enumerate(sequences_of(prompts_of(count)))
    ]


def replace_sampling(sequence: Sequence, sampling: SamplingParams) -> Sequence:
    if not sampling.ignore_eos:  # the kernels ban what the row's own end tokens are
        sampling = replace(sampling, stop_token_ids=END_TOKEN_IDS)
    return replace(sequence, sampling=sampling)


@in_host_memory
def test_an_engine_samples_every_step_on_the_device_a_step_ahead(monkeypatch):
    sequences = engine_sequences(10)
    expected = reference(model_of("qwen3"), sequences)
    monkeypatch.setattr("inference.model_runner.sample", refuse)
    completions, _ = run(
        plain_model_sampled_by_kernels("qwen3"),
        sequences,
        settings_of(block_size=16, max_num_blocks=60),
    )
    assert tokens(completions) == expected


@in_host_memory
def test_preempted_sequences_go_on_with_what_they_have_had(monkeypatch):
    sampling = SamplingParams(max_tokens=24, repetition_penalty=1.2, frequency_penalty=0.3)
    sequences = sequences_of(prompts_of(7), sampling)
    expected = reference(model_of("qwen3"), sequences, end_token_ids=())
    monkeypatch.setattr("inference.model_runner.sample", refuse)
    model = plain_model_sampled_by_kernels("qwen3")
    engine, _, _ = build_engine(model, settings_of(max_num_blocks=26), make_endless_row)
    expect_too_little(engine.scheduler)
    engine.submit(sequences)
    completions = {}
    while engine.num_unfinished:
        completions.update({c.seq_id: c for c in engine.step()})
    assert engine.scheduler.num_preemptions > 0
    assert tokens(completions) == expected


@in_host_memory
def test_steps_that_the_host_samples_are_counted_too():
    """A row with more end tokens than the kernels look for has the host sample until it is done."""
    slow = SamplingParams(max_tokens=4, stop_token_ids=tuple(range(200, 220)), ignore_eos=True)
    sequences = engine_sequences(5)
    sequences[2] = replace(sequences[2], sampling=slow)
    expected = reference(model_of("qwen3"), sequences)
    completions, _ = run(plain_model_sampled_by_kernels("qwen3"), sequences, settings_of())
    assert tokens(completions) == expected
