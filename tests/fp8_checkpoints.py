"""Tiny checkpoints stored as fp8 in blocks, and what they stand for."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def quantised_in_blocks(source: Path, folder: Path, block: int = 4) -> tuple[Path, Path]:
    """A checkpoint in fp8 blocks, and the full-precision one that it stands for.

    Qwen publishes blocks of 128x128; tiny models have no such widths.
    """
    stored, whole = (Path(shutil.copytree(source, folder / name)) for name in ("fp8", "whole"))
    weights = load_file(source / "model.safetensors")
    blocks: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if "_proj" not in name:
            blocks[name] = weight
            continue
        rows, columns = weight.shape[0] // block, weight.shape[1] // block
        tiles = weight.view(rows, block, columns, block)
        scales = tiles.abs().amax(dim=(1, 3), keepdim=True) / 448
        tiles_8 = (tiles / scales).to(torch.float8_e4m3fn)
        blocks[name] = tiles_8.view(weight.shape)
        blocks[f"{name}_scale_inv"] = scales[:, 0, :, 0].clone()
        weights[name] = (tiles_8.float() * scales).view(weight.shape)
    save_file(blocks, stored / "model.safetensors", metadata={"format": "pt"})
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    store(stored, settings | {"weight_block_size": [block, block]})
    return stored, whole


def store(folder: Path, settings: dict[str, Any]) -> Path:
    """Make config.json say how the weights are stored."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder
