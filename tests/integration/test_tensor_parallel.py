"""Tensor parallel gives one rank's tokens: 2, 3 and 4 ranks over gloo, dense and mixture of experts."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from inference.backends import create_backend
from inference.config import EngineConfig
from inference.errors import EngineConfigError
from inference.launch import Launch, RankProcesses
from tests.fp8_checkpoints import quantised_in_blocks
from tests.paged_cases import COMMON
from tests.rank_cases import HEADS

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: tensor parallel needs it")

MODELS = Path(__file__).parents[1] / "data" / "models"


def kinds(sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "dense": lambda: transformers.Qwen3Config(**sizes, head_dim=8),
        "tied": lambda: transformers.LlamaConfig(
            **sizes, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
        ),
        "moe": lambda: transformers.Qwen3MoeConfig(
            **sizes, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        ),
    }


DEEP = {f"deep-{name}": make for name, make in kinds({**HEADS, "num_hidden_layers": 6}).items()}
CONFIGS: dict[str, Any] = {
    **kinds(HEADS),
    **DEEP,
    "shared": lambda: transformers.Qwen2MoeConfig(
        **HEADS,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    ),
    "three": lambda: transformers.Qwen3Config(
        **{**COMMON, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 50},
        head_dim=8,
    ),
}
PAIRS = [
    "pair-dense",
    "pair-tied-with-biases",
    "pair-moe",
    "pair-experts-of-the-class",
    "pair-shared-experts",
    "pair-unmodified-class",
    "pair-fp8-blocks",
    "pair-fp8-blocks-of-experts",
    "pair-fp8-scale-missing",
    "pair-dense-while-read",
    "pair-tied-while-read",
    "pair-moe-while-read",
    "pair-refusals",
    "pair-weight-bytes",
    "pair-least-blocks",
]
CASES = {
    "four-fp8-blocks-cut-within": 4,
    **dict.fromkeys([*PAIRS, "four-moe", "four-dense", "four-broken-rows", "four-fabric"], 4),
    "three-dense": 3,
}


def save_model(name: str, folder: Path) -> None:
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="40KB")
    shutil.copy(MODELS / "tiny-a" / "tokenizer.json", folder)


def save_blocks(folder: Path) -> dict[str, str]:
    """Checkpoints stored as fp8 in blocks of 8x8; four ranks cut experts, 16 wide, within a block."""
    found = {}
    for name, kind in {"blocks": "dense", "expert-blocks": "moe"}.items():
        source = folder / f"{name}-source"
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
        model.save_pretrained(source)
        shutil.copy(MODELS / "tiny-a" / "tokenizer.json", source)
        pair = folder / f"{name}-pair"
        pair.mkdir()
        found[name] = ":".join(map(str, quantised_in_blocks(source, pair, 8)))
    broken = Path(shutil.copytree(found["blocks"].split(":")[0], folder / "no-scale"))
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight_scale_inv"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    return found | {"no-scale": str(broken)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of four ranks found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in CONFIGS:
        save_model(name, folder / name)
    document = folder / "document.json"
    models = {name: str(folder / name) for name in CONFIGS}
    models |= save_blocks(folder)
    document.write_text(json.dumps({"models": models, "found": str(folder)}))
    with (folder / "output").open("wb") as output:
        ranks = RankProcesses(
            Launch(module="tests.rank_cases", args=[str(document)], num_ranks=4), output
        )
        try:
            code = ranks.wait(240)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            ranks.stop()
    assert code == 0, (folder / "output").read_text()[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_give_the_tokens_of_one(case, found):
    differences = [of_rank[case] for of_rank in found if case in of_rank]
    assert differences == [""] * CASES[case]


def test_the_device_sampler_over_three_ranks_is_the_reference(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: kernels are not tested here")
    with (tmp_path / "output").open("wb") as output:
        ranks = RankProcesses(Launch(module="tests.rank_sampler", num_ranks=3), output)
        try:
            code = ranks.wait(240)
        finally:
            ranks.stop()
    assert code == 0, (tmp_path / "output").read_text()[-4000:]


@pytest.mark.parametrize("size", [3, 8])
def test_heads_that_do_not_divide_are_refused_with_the_sizes_that_work(size, tmp_path):
    save_model("dense", tmp_path / "dense")
    with pytest.raises(EngineConfigError) as refusal:
        create_backend(
            EngineConfig(model=str(tmp_path / "dense"), backend="paged", tensor_parallel_size=size)
        )
    assert str(refusal.value) == (
        f"engine.tensor_parallel_size is {size}: tensor parallel {size} does not divide 4 KV heads "
        f"and 8 attention heads; use 1, 2 or 4"
    )
