"""The reference sampler: exact where it can be, right on average where it draws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.sampler import NO_TOKEN, SamplerRow, sample
from inference.sampling import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -4.0])


def row(
    draw_seed: int = 0,
    prompt: tuple[int, ...] = (),
    so_far: tuple[int, ...] = (),
    ends: tuple[int, ...] = (),
    **fields: object,
) -> SamplerRow:
    return SamplerRow(SamplingParams(**fields), draw_seed, prompt, so_far, ends)


def draws(logits: torch.Tensor, num: int, **fields: object) -> torch.Tensor:
    """Count `num` draws, each with a seed of its own."""
    rows = [row(draw_seed=i, **fields) for i in range(num)]
    found = sample(logits.expand(num, -1), rows).token_ids
    return torch.bincount(torch.tensor(found), minlength=logits.shape[-1])


def greedy(logits: list[float] | torch.Tensor, **fields: object) -> int:
    return sample(torch.as_tensor(logits)[None], [row(**fields)]).token_ids[0]


def deviation(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """How many standard deviations the chi-square of the counts lies above its mean."""
    kept = probs > 0
    assert counts[~kept].sum() == 0
    expected = probs[kept] * counts.sum()
    statistic = ((counts[kept] - expected) ** 2 / expected).sum().item()
    free = max(1, int(kept.sum()) - 1)
    return (statistic - free) / math.sqrt(2 * free)


def test_greedy_takes_the_largest_and_the_lowest_id_of_equals():
    logits = torch.zeros(3, 50_000)
    logits[0, [40_000, 123, 49_999]] = 5.0
    logits[1, 49_999] = 1e-6
    assert sample(logits, [row()] * 3).token_ids == [123, 49_999, 0]


def test_greedy_is_exact_on_bfloat16_logits():
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.5]], dtype=torch.bfloat16)
    assert sample(logits, [row()]).token_ids == [1]


def test_logits_are_left_as_they_were():
    logits = LOGITS[None].clone()
    sample(
        logits, [row(so_far=(0,), repetition_penalty=2.0, min_tokens=5, ends=(1,), max_tokens=9)]
    )
    assert torch.equal(logits[0], LOGITS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_softmax(temperature):
    counts = draws(LOGITS, 20_000, temperature=temperature)
    assert deviation(counts, (LOGITS / temperature).softmax(-1)) < 4


def test_draws_at_successive_positions_follow_softmax_too():
    rows = [row(draw_seed=99, so_far=(0,) * i, temperature=1.0) for i in range(5_000)]
    found = sample(LOGITS.expand(5_000, -1), rows).token_ids
    counts = torch.bincount(torch.tensor(found), minlength=8)
    assert deviation(counts, LOGITS.softmax(-1)) < 4


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 1}, [0]),
        ({"top_k": 100}, list(range(8))),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.7}, [0, 1]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.2}, [0, 1, 2]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.9}, [0, 1, 2]),
        ({"top_k": 2, "top_p": 0.74, "min_p": 0.1}, [0, 1]),
        ({"top_k": 2, "top_p": 0.73}, [0]),
    ],
)
def test_what_is_dropped_is_never_drawn_and_the_rest_keeps_its_shares(fields, kept):
    probs = torch.zeros(8)
    probs[kept] = LOGITS[kept].softmax(-1)
    assert deviation(draws(LOGITS, 6_000, temperature=1.0, **fields), probs) < 4


def test_top_k_keeps_all_that_tie_with_the_last():
    counts = draws(torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]), 3_000, temperature=2.0, top_k=2)
    assert (counts > 0).tolist() == [True, True, True, True, False]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-60, 60), min_size=2, max_size=12, unique=True),
    st.floats(0.01, 1.0),
    st.integers(0, 12),
)
def test_top_k_then_top_p_keep_what_plain_arithmetic_keeps(tenths, top_p, top_k):
    logits = torch.tensor(tenths, dtype=torch.float32) / 10
    order = sorted(range(len(tenths)), key=lambda i: -tenths[i])[: top_k or None]
    weights = [math.exp(tenths[i] / 10) for i in order]
    kept, reached = [], 0.0
    for token_id, weight in zip(order, weights, strict=True):
        if kept and reached >= top_p * sum(weights):
            break
        # Where rounding could decide, there is nothing to check.
        if abs(reached - top_p * sum(weights)) < 1e-4 * sum(weights):
            return
        kept.append(token_id)
        reached += weight
    rows = [row(draw_seed=i, temperature=1.0, top_p=top_p, top_k=top_k) for i in range(400)]
    found = set(sample(logits.expand(400, -1), rows).token_ids)
    likely = {i for i, w in zip(order, weights, strict=True) if w > 0.05 * sum(weights)}
    assert likely & set(kept) <= found <= set(kept)


def test_tiny_temperatures_are_greedy_and_never_overflow():
    logits = torch.tensor([-1e4, 3.0, 2.999, 1e4, 9.9e3])
    assert draws(logits, 50, temperature=1e-30).tolist() == [0, 0, 0, 50, 0]


def test_a_row_never_feels_its_neighbours():
    torch.manual_seed(0)
    logits = torch.randn(6, 1000)
    rows = [
        row(draw_seed=1, temperature=0.9),
        row(draw_seed=2, temperature=1.2, top_k=50, top_p=0.9),
        row(),
        row(draw_seed=3, temperature=0.7, min_p=0.05, logprobs=2),
        row(so_far=(5, 6, 5), frequency_penalty=1.5, presence_penalty=-0.5),
        row(draw_seed=4, temperature=1.0, prompt=(1, 2), repetition_penalty=1.3, so_far=(9,)),
    ]
    together = sample(logits, rows)
    for i in range(6):
        alone = sample(logits[i : i + 1], [rows[i]])
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == together.logprobs[i]
    backwards = sample(logits.flip(0), rows[::-1])
    assert backwards.token_ids[::-1] == together.token_ids


def test_another_seed_or_position_is_another_draw():
    logits = torch.zeros(1, 50_000)
    found = {sample(logits, [row(draw_seed=i, temperature=1.0)]).token_ids[0] for i in range(20)}
    found |= {
        sample(logits, [row(so_far=(0,) * i, temperature=1.0)]).token_ids[0] for i in range(1, 20)
    }
    assert len(found) > 36


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    # 2.0 / 2 = 1.0 falls behind 1.5; -1.0 * 2 falls behind -1.5.
    assert greedy([2.0, 1.5], prompt=(0,), repetition_penalty=2.0) == 1
    assert greedy([2.0, 1.5], so_far=(0,), repetition_penalty=2.0) == 1
    assert greedy([-1.0, -1.5], prompt=(0, 0), repetition_penalty=2.0) == 1
    assert greedy([2.0, 1.5], prompt=(0, 1), so_far=(1, 0, 1), repetition_penalty=2.0) == 0


def test_frequency_and_presence_count_the_completion_only():
    assert greedy([2.0, 1.0], prompt=(0, 0, 0), frequency_penalty=2.0, presence_penalty=2.0) == 0
    assert greedy([2.0, 1.0], so_far=(0, 0, 0), frequency_penalty=0.4) == 1
    assert greedy([2.0, 1.0], so_far=(0, 0), frequency_penalty=0.4) == 0
    assert greedy([2.0, 1.0], so_far=(0, 0, 0), presence_penalty=0.9) == 0
    assert greedy([2.0, 1.0], so_far=(0,), presence_penalty=1.1) == 1
    assert greedy([1.0, 2.0], so_far=(0,), presence_penalty=-1.5) == 0


def test_prompt_ids_beyond_the_logits_are_harmless():
    assert greedy([2.0, 1.5], prompt=(7, 0), repetition_penalty=2.0) == 1


def test_min_tokens_bans_the_end_until_it_is_reached():
    fields = {"ends": (0,), "stop_token_ids": (1,), "min_tokens": 2, "max_tokens": 5}
    assert greedy([3.0, 2.0, 1.0], so_far=(2,), **fields) == 2
    assert greedy([3.0, 2.0, 1.0], so_far=(2, 2), **fields) == 0
    assert greedy([3.0, 2.0, 1.0], so_far=(2,), ignore_eos=True, **fields) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_has_no_token_and_harms_no_other(bad):
    logits = torch.stack([LOGITS, LOGITS, LOGITS])
    logits[1, 3] = bad
    for fields in ({}, {"temperature": 1.0}):
        rows = [row(draw_seed=i, logprobs=1, **fields) for i in range(3)]
        found = sample(logits, rows)
        whole = sample(LOGITS.expand(3, -1), rows)
        assert found.token_ids[1] == NO_TOKEN
        assert found.logprobs[1] is None
        assert [found.token_ids[i] for i in (0, 2)] == [whole.token_ids[i] for i in (0, 2)]


def test_a_row_that_allows_nothing_has_no_token():
    assert greedy([-math.inf, -math.inf]) == NO_TOKEN
    assert greedy([1.0], ends=(0,), min_tokens=1) == NO_TOKEN


def test_logprobs_are_those_of_the_model_whatever_is_sampled():
    fields = {"temperature": 0.3, "top_k": 1, "so_far": (0, 0), "frequency_penalty": 2.0}
    entry = sample(LOGITS[None], [row(logprobs=3, **fields)]).logprobs[0]
    expected = LOGITS.log_softmax(-1)
    assert entry is not None
    assert entry.token_id == 1
    assert entry.logprob == pytest.approx(expected[1].item())
    assert [token_id for token_id, _ in entry.top] == [0, 1, 2]
    assert [value for _, value in entry.top] == pytest.approx(expected[:3].tolist())


def test_logprobs_of_equals_come_by_id():
    entry = sample(torch.tensor([[1.0, 1.0, 0.0]]), [row(logprobs=2)]).logprobs[0]
    assert entry is not None
    assert [token_id for token_id, _ in entry.top] == [0, 1]


def test_as_many_rows_as_logits_or_none_at_all():
    with pytest.raises(ValueError, match="2 rows of logits for 1 rows"):
        sample(LOGITS.expand(2, -1), [row()])
