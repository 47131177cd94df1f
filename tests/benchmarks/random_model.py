"""Models of published shapes without their weights: a folder that looks whole, and random weights on the device.

The weight file of `write_folder` is a hole, as long as its header says, all zeros, taking no room on disk; or random.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers

ROOT = Path(__file__).parents[2]
_COMMON: dict[str, Any] = {
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": {
        **_COMMON,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "8b": {
        **_COMMON,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "32b": {
        **_COMMON,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
    "30b-a3b": {
        **_COMMON,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "235b-a22b": {
        **_COMMON,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 151_936,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "tiny-moe": {
        "vocab_size": 151_936,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
_NUM_RANDOM_VALUES = 100_000_007
"""Prime, so that no two matrices of a model are the same values."""

_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def config_of(shape: str, *, layers: int | None = None) -> Any:
    """Return the config of a shape, in bf16 on CUDA, else fp32."""
    values = dict(SHAPES[shape])
    values["dtype"] = "bfloat16" if torch.cuda.is_available() else "float32"
    if layers is not None:
        values["num_hidden_layers"] = layers
    classes: Any = transformers
    make = classes.Qwen3MoeConfig if "num_experts" in values else classes.Qwen3Config
    return make(**values)


def write_folder(folder: Path, config: Any, *, is_random: bool = False) -> Path:
    """Write a folder whose every file is right but that all weights are zero, or random as `fill_randomly` has them."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, str(config.dtype).removeprefix("torch."))
        )
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer = ROOT / "tests" / "data" / "models" / "tiny-a" / "tokenizer.json"
    shutil.copy(tokenizer, folder / "tokenizer.json")
    header: dict[str, Any] = {}
    offset = 0
    for name, parameter in model.named_parameters():
        header[name] = {
            "dtype": _DTYPES[parameter.dtype],
            "shape": list(parameter.shape),
            "data_offsets": [offset, offset + parameter.nbytes],
        }
        offset += parameter.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if is_random:
            _write_randomly(file, model)
        file.truncate(8 + len(text) + offset)
    return folder


def _write_randomly(file: BinaryIO, model: Any) -> None:
    """Write all parameters in order: matrices from one run of random values, begun anew elsewhere in each."""
    values = torch.empty(_NUM_RANDOM_VALUES, dtype=model.dtype)
    values.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    run, at = values.view(torch.uint8).numpy().data, 0
    for parameter in model.parameters():
        if parameter.dim() == 1:
            file.write(torch.ones_like(parameter, device="cpu").view(torch.uint8).numpy().data)
            continue
        left = parameter.nbytes
        while left:
            part = run[at : at + left]
            file.write(part)
            left -= len(part)
            at = (at + len(part)) % len(run)


@torch.no_grad()
def fill_randomly(model: Any, seed: int = 0) -> None:
    """Give every parameter random values where it is; vectors, which scale, become ones."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
