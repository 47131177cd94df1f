"""Floors against a sort in fp64, by every way through the kernel; in Triton's interpreter without a GPU.

Few lanes with few places have even short rows searched as long flat ones are. Where weights are powers of two, not far
apart, and top-p is some sixteenths, no sum is rounded, so every way has to end in the same token.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed: kernels are not tested here")

from inference.kernels.floors import floors_kernel
from inference.sampler import SamplerRow
from inference.sampling import SamplingParams
from inference.slot_params import SlotParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BINARY = 1.4426950408889634
"""A temperature under which a score of one less weighs half as much."""

ROOMY, TINY = (32, 2, 8), (4, 1, 1)
"""Lanes, neighbours and places."""


def floors_of(
    logits: torch.Tensor,
    samplings: list[SamplingParams],
    shape: tuple[int, int, int] = ROOMY,
    poison: float = math.nan,
) -> list[int]:
    """Return the rows' floors as ordered bits, and check that nothing is written past the rows' scratch."""
    (num_rows, vocab), (lanes, neighbours, places) = logits.shape, shape
    params = SlotParams(num_rows + 1, DEVICE)
    slots = [num_rows - i for i in range(num_rows)]
    for slot, sampling in zip(slots, samplings, strict=True):
        params.write(slot, SamplerRow(sampling, 1, [1]))
    whole = logits.float()
    top = torch.where(whole.isnan() | whole.isposinf(), -math.inf, whole).amax(1)
    floors = torch.full((num_rows,), -5, dtype=torch.int32, device=DEVICE)
    scratch = torch.full((num_rows + 1, lanes * places), poison, device=DEVICE)
    scratch[num_rows] = 77.0
    with np.errstate(all="ignore"):  # the interpreter's numpy warns where the device does not
        floors_kernel[(num_rows,)](
            logits,
            params.on_device,
            torch.stack([top, top], 1),
            torch.tensor(slots, dtype=torch.int32, device=DEVICE),
            params.on_device,
            floors,
            scratch,
            vocab,
            C=2,
            C_PAD=2,
            HAS_PENALTIES=False,
            TALLY_BY_ROW=False,
            L=lanes,
            W=neighbours,
            D=places,
            num_warps=4,
        )
    assert (scratch[num_rows] == 77.0).all()
    return [floor & 0xFFFFFFFF for floor in floors.tolist()]


def ordered(scores: torch.Tensor) -> np.ndarray:
    bits = (scores.float().cpu() + 0.0).numpy().view(np.uint32).astype(np.int64)
    return np.where(bits >> 31, bits ^ 0xFFFFFFFF, bits | 0x80000000)


def kept_by_sort(scores: torch.Tensor, sampling: SamplingParams, slack: float = 0.0) -> np.ndarray:
    """Return which scores stay; with more slack, more by top-p."""
    x = scores.double().cpu().numpy()
    scaled = (x - x.max()) / np.float64(np.float32(sampling.temperature))
    floor = math.log(sampling.min_p) * 1.000001 if sampling.min_p else -math.inf
    in_order = -np.sort(-scaled)
    if 0 < sampling.top_k < len(x):
        floor = max(floor, in_order[sampling.top_k - 1])
    if sampling.top_p < 1.0:
        weights = np.exp(in_order)
        weights[in_order < floor] = 0.0
        before = np.cumsum(weights) - weights
        is_kept = before < weights.sum() * (float(np.float32(sampling.top_p)) + slack)
        floor = max(floor, in_order[max(1, is_kept.sum()) - 1])
    return scaled >= floor


def check(logits: torch.Tensor, samplings: list[SamplingParams], shape: Any) -> None:
    """What is kept is what a sort keeps, but for tokens that rounded sums may add or drop."""
    for i, floor in enumerate(floors_of(logits, samplings, shape)):
        kept = ordered(logits[i]) >= floor
        assert (kept >= kept_by_sort(logits[i], samplings[i], -2e-6)).all(), samplings[i]
        assert (kept <= kept_by_sort(logits[i], samplings[i], 2e-6)).all(), samplings[i]


def rows_of(kind: str, num_rows: int, vocab: int) -> torch.Tensor:
    noise = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(5))
    if kind == "peaked":
        return noise + 12 * (noise > 2.2)
    if kind == "falling":
        return -3 * torch.log(torch.arange(1.0, vocab + 1)) + 0.01 * noise
    if kind == "one value":
        return torch.full_like(noise, -7.5)
    if kind == "neighbours":  # no bits between them
        return torch.full_like(noise, 1.0) + noise.argsort(1) * 2.0**-23
    if kind == "few values":
        return noise.round()
    if kind == "huge":
        return noise * 1e37
    if kind == "tiny":
        return noise * 1e-36
    if kind == "mostly forbidden":
        return noise.masked_fill(torch.arange(vocab) % 9 != 4, -math.inf)
    return noise


SAMPLINGS = [
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
    SamplingParams(temperature=1.0, top_p=0.95),
    SamplingParams(temperature=1.3, top_k=33),
    SamplingParams(temperature=1.0, top_k=10, top_p=0.99),
    SamplingParams(temperature=5.0, top_k=11, top_p=0.3, min_p=0.3),
    SamplingParams(temperature=1.0, top_k=10**6),
    SamplingParams(temperature=1.0, top_p=0.9999999),
    SamplingParams(temperature=100.0, top_p=0.5),
    SamplingParams(temperature=1e-6, top_p=1e-6),
    SamplingParams(temperature=1e-30, top_k=7, top_p=0.5),
    SamplingParams(temperature=1.0, top_k=9, min_p=0.1),
    SamplingParams(temperature=1.0, min_p=0.05, top_p=0.7),
    SamplingParams(temperature=1.0, min_p=1.0),
]
KINDS = [
    "flat",
    "peaked",
    "falling",
    "one value",
    "neighbours",
    "few values",
    "mostly forbidden",
    "huge",
    "tiny",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floors_keep_what_a_sort_keeps(kind, dtype):
    check(rows_of(kind, len(SAMPLINGS), 100).to(DEVICE, dtype), SAMPLINGS, ROOMY)


@pytest.mark.parametrize("kind", ["flat", "one value", "neighbours", "few values"])
def test_floors_of_scores_that_never_fit_scratch_are_a_sorts(kind):
    check(rows_of(kind, len(SAMPLINGS), 11).to(DEVICE), SAMPLINGS, TINY)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.one_of(st.integers(-5, 9), st.just(-math.inf)), min_size=2, max_size=24),
    st.integers(0, 9),
    st.sampled_from([1.0, 0.5, 0.75, 1 / 16, 15 / 16]),
    st.sampled_from([0.0, 0.25, 1 / 1024]),
    st.sampled_from([ROOMY, TINY]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@example([-1, -math.inf], 2, 0.5, 0.0, ROOMY, torch.float32)
def test_where_sums_are_exact_floors_are_a_sorts_to_the_last_token(
    scores, top_k, top_p, min_p, shape, dtype
):
    logits = torch.tensor([[*scores, 5]], dtype=dtype, device=DEVICE)
    sampling = SamplingParams(temperature=BINARY, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = ordered(logits[0]) >= floors_of(logits, [sampling], shape)[0]
    assert kept.tolist() == kept_by_sort(logits[0], sampling).tolist()


def test_floors_found_in_scratch_are_those_that_narrow_ranges_end_in():
    """One place a lane is too few for these rows, eight are enough."""
    samplings = [
        SamplingParams(temperature=BINARY, **asked)
        for asked in ({"top_k": 7}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.75}, {"top_k": 17})
    ]
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(-6, 9, (len(samplings), 18), generator=generator) / 1.0
    roomy = floors_of(logits.to(DEVICE), samplings, (4, 2, 8))
    assert floors_of(logits.to(DEVICE), samplings, (4, 2, 1)) == roomy


@pytest.mark.parametrize("shape", [ROOMY, TINY])
def test_what_scratch_held_does_not_matter(shape):
    logits = rows_of("flat", 3, 20).to(DEVICE)
    first = floors_of(logits, SAMPLINGS[1:4], shape)
    for poison in (math.inf, -math.inf, 3e38, 0.0):
        assert floors_of(logits, SAMPLINGS[1:4], shape, poison) == first


@pytest.mark.parametrize("shape", [ROOMY, TINY])
def test_broken_rows_come_to_an_end_and_leave_others_alone(shape):
    logits = rows_of("flat", 7, 20).to(DEVICE)
    whole = floors_of(logits, [SAMPLINGS[1]] * 7, shape)
    logits[0, 3], logits[1, 4], logits[1, 5] = math.nan, math.inf, -math.inf
    logits[2], logits[3], logits[4] = math.nan, math.inf, -math.inf
    for sampling in (SAMPLINGS[1], SAMPLINGS[12]):
        found = floors_of(logits, [sampling] * 5 + [SAMPLINGS[1]] * 2, shape)
        assert found[5:] == whole[5:]
