"""The README's table of tiers is what `nightjar tiers` says."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main

README = Path(__file__).parents[2] / "README.md"
GPUS = ["L4", "L40S", "A100-80", "H100", "H200"]
HEADER = "| model | weights | " + " | ".join(GPUS) + " |"
COMMON: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def config(
    layers: int, hidden: int, intermediate: int, heads: int, **changes: Any
) -> dict[str, Any]:
    sizes = {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
    }
    return {**COMMON, **sizes, **changes}


def experts(width: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


MODELS = {
    "Qwen3-8B": config(36, 4096, 12288, 32),
    "Qwen3-32B": config(64, 5120, 25600, 64),
    "Qwen3-30B-A3B": config(48, 2048, 6144, 32, **experts(768)),
    "Llama-3.3-70B": config(80, 8192, 28672, 64, model_type="llama", vocab_size=128256),
    "Qwen3-235B-A22B": config(94, 4096, 12288, 64, **experts(1536)),
}


def rows_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What the command says of a model, every count, weights on the GPUs."""
    main(["tiers", str(folder), "--all", "--json"])
    rows = json.loads(capsys.readouterr().out)
    return [row for row in rows if row["fits"] and row["offload"] == "none"]


def cell(rows: list[dict[str, Any]], gpu: str, quantization: str) -> str:
    """The fewest GPUs that hold one replica."""
    found = [
        row["num_gpus"]
        for row in rows
        if row["gpu"] == gpu and row["quantization"] == quantization and row["replicas"] == 1
    ]
    return str(min(found, default="-"))


def test_the_table_of_tiers_is_what_the_command_says(tmp_path, capsys):
    lines = [HEADER, "|---|---|" + "---|" * len(GPUS)]
    for name, values in MODELS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(values))
        rows = rows_of(folder, capsys)
        for label, quantization in (("bf16", "none"), ("fp8", "fp8")):
            cells = [cell(rows, gpu, quantization) for gpu in GPUS]
            lines.append(f"| {name} | {label} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    assert table in README.read_text(), f"the README should say:\n{table}"
