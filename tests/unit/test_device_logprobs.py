"""Log-probabilities worked out on the device are the reference sampler's; in Triton's interpreter without a GPU."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed: kernels are not tested here")

from inference.in_flight import InFlight
from inference.kernels import device_sampler
from inference.sampler import SamplerRow, sample
from inference.sampling import MAX_LOGPROBS, SamplingParams
from inference.sequence import TokenLogprob
from inference.slot_params import STOPPED, SlotParams
from tests.paged_cases import model_of, prompts_of, run, sequences_of, settings_of
from tests.plain_kernels import plain_model_sampled_by_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
in_host_memory = pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/gpu has it on the card")


def device_logprobs(logits: torch.Tensor, rows: list[SamplerRow]) -> list[TokenLogprob | None]:
    """What the device leaves for the host, None for rows that do not ask."""
    count = len(rows)
    params = SlotParams(count, DEVICE)
    for slot, row in enumerate(rows):
        params.write(slot, row)
    slots = torch.arange(count, dtype=torch.int32, device=DEVICE)
    result = torch.zeros_like(slots)
    found = torch.full((count, 1 + 2 * MAX_LOGPROBS), -7, dtype=torch.int32, device=DEVICE)
    device_sampler.sample(
        logits.clone(),
        slots,
        torch.tensor([len(row.token_ids) for row in rows], dtype=torch.int32, device=DEVICE),
        torch.tensor([0, 0, count, 0, 0, 0, 0, 0], dtype=torch.int32, device=DEVICE),
        params.on_device,
        torch.zeros_like(slots),
        result,
        has_draws=params.has_draws,
        has_floors=params.has_floors,
        has_bans=params.has_bans,
        logprobs=found,
    )
    flight = InFlight(None, np.arange(count), result.cpu(), None, None, found.cpu())
    tokens = (flight.token_ids() & (STOPPED - 1)).tolist()
    return [
        None
        if row.sampling.logprobs is None
        else flight.logprob(i, tokens[i], row.sampling.logprobs)
        for i, row in enumerate(rows)
    ]


def assert_same(found: Any, expected: Any, logits: torch.Tensor) -> None:
    """Tokens whose log-probabilities agree to the last places may stand for each other."""
    whole = logits.float().log_softmax(-1).cpu()
    assert len(found) == len(expected)
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert (mine is None) == (theirs is None)
        if mine is None:
            continue
        ids, values = [token for token, _ in mine.top], [value for _, value in mine.top]
        assert mine.token_id == theirs.token_id
        assert mine.logprob == pytest.approx(theirs.logprob, abs=2e-5)
        assert values == pytest.approx([value for _, value in theirs.top], abs=2e-5)
        assert values == pytest.approx(whole[i, ids].tolist(), abs=2e-5)
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_models_own_whatever_is_sampled(dtype):
    vocab = 4500  # parts of it, the last of them not full
    kinds = [
        SamplingParams(logprobs=5),
        SamplingParams(),
        SamplingParams(logprobs=0, temperature=0.8),
        SamplingParams(logprobs=MAX_LOGPROBS, temperature=1.5, top_p=0.7),
        SamplingParams(logprobs=3, min_tokens=9),
    ]
    rows = [SamplerRow(kind, i, [1], [0] * i, {7, 9}) for i, kind in enumerate(kinds)]
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(1)) * 4
    logits[:, 4400] = 20
    logits[:, 7] = 21  # banned in the last row, and the most likely all the same
    logits = logits.to(DEVICE, dtype)
    expected = sample(logits, rows).logprobs
    assert_same(device_logprobs(logits, rows), expected, logits)
    assert expected[4].top[0][0] == 7
    assert expected[4].token_id != 7


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.one_of(st.floats(-80, 80, width=32), st.just(-math.inf)),
        min_size=2,
        max_size=30,
        unique=True,
    ),
    st.integers(0, MAX_LOGPROBS),
)
def test_any_logits_have_the_references_logprobs(values, count):
    logits = torch.tensor([values], device=DEVICE)
    rows = [SamplerRow(SamplingParams(logprobs=count), 3, [1])]
    expected = sample(logits, rows).logprobs
    # What is impossible is not listed.
    possible = tuple(pair for pair in expected[0].top if pair[1] > -math.inf)
    assert_same(device_logprobs(logits, rows), [expected[0]._replace(top=possible)], logits)


def test_of_tokens_that_tie_the_lower_ids_come_first():
    logits = torch.zeros(1, 5000, device=DEVICE)
    logits[0, [4999, 40]] = 1.0
    found = device_logprobs(logits, [SamplerRow(SamplingParams(logprobs=5), 3, [1])])[0]
    assert [token for token, _ in found.top] == [40, 4999, 0, 1, 2]


@in_host_memory
def test_an_engine_returns_them_without_the_host(monkeypatch):
    sampling = SamplingParams(max_tokens=7, temperature=0.7, logprobs=3, ignore_eos=True)
    sequences = sequences_of(prompts_of(5), sampling)
    sequences[1] = replace(sequences[1], sampling=SamplingParams(max_tokens=5))
    model = model_of("qwen3")
    monkeypatch.setattr("inference.model_runner.sample", refuse)
    completions, _ = run(
        plain_model_sampled_by_kernels("qwen3"),
        sequences,
        settings_of(block_size=16, max_num_blocks=60),
    )
    assert completions[1].logprobs is None
    for sequence in (sequences[0], sequences[3]):
        completion = completions[sequence.seq_id]
        assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
        ids = torch.tensor([[*sequence.prompt_token_ids, *completion.token_ids]])
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, -8:-1]
        rows = [
            SamplerRow(sampling, sequence.draw_seed, [1], completion.token_ids[:i])
            for i in range(7)
        ]
        assert_same(completion.logprobs, sample(logits, rows).logprobs, logits)


def refuse(*args: Any) -> Any:
    raise AssertionError("the host sampled")
