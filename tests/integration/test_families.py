"""Every family of transformers that the paged engine takes gives its class's own tokens; a tiny random model of each."""

from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights

from inference.family_trial import refuse_by_trial
from inference.model import make_paged_model
from tests.paged_cases import (
    COMMON,
    prompts_of,
    reference,
    run,
    sequences_of,
    settings_of,
    tokens,
)

SMALL: dict[str, Any] = {
    **COMMON,
    "dff": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "moe_k": 2,
    "moe_num_experts": 4,
    "n_group": 1,
    "n_inner": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_layers": 2,
    "num_local_experts": 4,
    "rotary_dim": 4,
    "shared_expert_intermediate_size": 16,
    "sliding_window": 12,
    "topk_group": 1,
    "word_embed_proj_dim": 32,
}
"""What a family's config may be given, as far as it knows the names."""

NAMES = (
    "afmoe apertus apertus1p5_text arcee aria_text biogpt bitnet codegen ctrl dots1 ernie4_5 ernie4_5_moe "
    "exaone exaone4 exaone_moe flex_olmo glm glm4 glm4_moe gpt2 gpt_bigcode gptj granite granitemoe "
    "granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 "
    "kolibri1 laguna mellum minimax_m2 ministral ministral3 mixtral moshi nemotron olmo olmo2 olmo3 olmoe "
    "opt persimmon phi phi3 phimoe qwen2_moe sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2"
)

FAMILIES: dict[str, dict[str, Any]] = {name: {} for name in NAMES.split()} | {
    "cwm": {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1},
    "lfm2": {"layer_types": ["full_attention"] * 2},
    "minimax_m3_vl_text": {"layer_types": ["full_attention"] * 2},
}


def config_of(family: str) -> Any:
    kind = transformers.CONFIG_MAPPING[family]
    default = kind()
    names = {*default.to_dict(), *kind.attribute_map}
    values = {name: value for name, value in SMALL.items() if name in names}
    if getattr(default, "sliding_window", None) is None:
        values.pop("sliding_window", None)
    if kinds := getattr(default, "layer_types", None):
        values["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[:2]
    return kind(**{**values, **FAMILIES[family]})


def model_of(family: str) -> Any:
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_is_not_refused_gives_the_tokens_of_its_class(family):
    with init_empty_weights(include_buffers=False):
        empty = transformers.AutoModelForCausalLM.from_config(config_of(family))
    assert empty.num_parameters() < 1e6, "a setting's name is missing in SMALL"
    refuse_by_trial(empty)
    sequences = sequences_of(prompts_of(4), max_tokens=8)
    completions, _ = run(make_paged_model(model_of(family)), sequences, settings_of())
    assert tokens(completions) == reference(model_of(family), sequences)
