"""Of each family of models the sizing offers what the engine takes: checked against tiny ones of each."""

import re

import pytest
import torch
import transformers

from inference.autotp import COLUMN_PATTERNS, ROW_PATTERNS, _unknown
from inference.errors import EngineConfigError
from inference.model import make_paged_model
from inference.model_config import model_shape
from inference.partition import _cut_experts
from inference.tensor_parallel import TensorParallel
from inference.tier import Options
from inference.tiers import size_model
from inference.workload import Workload
from tasks.hardware import load_hardware

H100 = next(gpu for gpu in load_hardware() if gpu.name == "H100")
WORKLOAD = Workload.from_totals(100, 10_000, 10_000, max_completion_tokens=128)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": {},
    "llama with long positions": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "mistral": {},
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
    "qwen3_moe of odd experts": {"head_dim": 8, **EXPERTS, "moe_intermediate_size": 15},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {},
    "phi": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "cohere": {},
    "granite": {},
    "granite that scales its logits": {"logits_scaling": 8.0},
    "glm4": {"head_dim": 8},
    "gpt_neox": {},
    "olmo2": {},
    "starcoder2": {},
}


def config_of(family):
    return transformers.AutoConfig.for_model(family.split()[0], **SIZES, **FAMILIES[family])


def offered(config, size, quantization):
    """Backends of the layouts that the sizing offers for a replica of `size` GPUs."""
    options = Options(tensor_parallel_size=size, quantizations=(quantization,))
    shape = model_shape(config.to_dict() | {"dtype": "bfloat16"})
    return {tier.backend for tier in size_model(shape, [H100], WORKLOAD, options=options).tiers}


def refusal_by_paged(config, *, is_fp8):
    """What the paged backend says against a model on one GPU; empty when it takes it."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        make_paged_model(model.eval(), is_fp8=is_fp8)
    except EngineConfigError as error:
        return str(error)
    return ""


def refusal_by_ranks(config):
    """What stands against two ranks that share a model; empty when nothing does."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    try:
        _cut_experts(model, TensorParallel(0, 2, None))
    except EngineConfigError as error:
        return str(error)
    found = [
        _unknown(name, module, model)
        for name, module in model.named_modules()
        if not any(re.match(rule, f"{name}.weight") for rule in COLUMN_PATTERNS + ROW_PATTERNS)
    ]
    return next(filter(None, found), "")


@pytest.mark.parametrize("family", FAMILIES)
def test_on_one_gpu_the_backend_offered_is_one_that_takes_the_model(family):
    takes = not refusal_by_paged(config_of(family), is_fp8=False)
    assert offered(config_of(family), 1, "none") == {"paged" if takes else "transformers"}


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_is_offered_where_the_paged_backend_has_it(family):
    takes = not refusal_by_paged(config_of(family), is_fp8=True)
    assert offered(config_of(family), 1, "fp8") == ({"paged"} if takes else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_two_gpus_are_offered_for_what_ranks_can_share(family):
    config = config_of(family)
    takes = not refusal_by_ranks(config) and not refusal_by_paged(config, is_fp8=False)
    assert offered(config, 2, "none") == ({"paged"} if takes else set())
