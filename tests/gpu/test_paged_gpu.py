"""The paged engine on CUDA, with its kernels, graphs and steps ahead, gives the plain model's tokens in fp32."""

import pytest
import torch

from inference.build_engine import build_engine
from inference.model import make_paged_model
from inference.sampling import SamplingParams
from tests.paged_cases import (
    CONFIGS,
    make_endless_row,
    model_of,
    prompts_of,
    reference,
    run,
    sequences_of,
    settings_of,
    tokens,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = {"max_num_seqs": 16, "block_size": 16, "min_step_tokens": 8, "max_num_blocks": 400}


def paged(family: str):
    from inference.kernels import fused

    return make_paged_model(model_of(family).cuda(), fused)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "qwen3-moe"])
def test_every_family_gives_the_plain_models_tokens(family):
    sequences = sequences_of(prompts_of(40, shared=18))
    expected = reference(model_of(family).cuda(), sequences)
    completions, _ = run(paged(family), sequences, settings_of(**SETTINGS))
    assert tokens(completions) == expected


def test_experts_are_captured_too():
    sequences = sequences_of(prompts_of(20))
    expected = reference(model_of("qwen3-moe").cuda(), sequences)
    completions, _ = run(paged("qwen3-moe"), sequences, settings_of(**SETTINGS))
    assert tokens(completions) == expected


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_layers_quantised_on_their_way_from_host_memory_are_those_quantised_in_place(family):
    from inference.kernels import fused

    sequences = sequences_of(prompts_of(20))
    settings = settings_of(**SETTINGS, kv_dtype=torch.bfloat16)
    model = model_of(family).bfloat16()
    moved = make_paged_model(model, fused, is_fp8=True, device=torch.device("cuda"))
    found, _ = run(moved, sequences, settings)
    in_place = make_paged_model(model_of(family).bfloat16().cuda(), fused, is_fp8=True)
    expected, _ = run(in_place, sequences, settings)
    assert tokens(found) == tokens(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
        {"temperature": 0.9, "repetition_penalty": 1.2},
        {"temperature": 0.7, "min_tokens": 5, "logprobs": 2},
    ],
)
def test_draws_and_ends_are_the_references(changes):
    sampling = SamplingParams(max_tokens=30, ignore_eos="min_tokens" in changes, **changes)
    sequences = sequences_of(prompts_of(24), sampling)
    expected = reference(model_of("qwen3").cuda(), sequences)
    completions, _ = run(paged("qwen3"), sequences, settings_of(**SETTINGS))
    assert tokens(completions) == expected


def test_preemption_with_steps_in_flight_changes_nothing():
    sampling = SamplingParams(max_tokens=60, temperature=0.8)
    sequences = sequences_of(prompts_of(16), sampling)
    expected = reference(model_of("qwen3").cuda(), sequences, end_token_ids=())
    settings = settings_of(**{**SETTINGS, "max_num_blocks": 24})
    engine, _, _ = build_engine(paged("qwen3"), settings, make_endless_row)
    engine.scheduler.lengths.observe(1)
    engine.submit(sequences)
    completions = {}
    while engine.num_unfinished:
        completions.update({c.seq_id: c for c in engine.step()})
    assert engine.scheduler.num_preemptions > 0
    assert tokens(completions) == expected
