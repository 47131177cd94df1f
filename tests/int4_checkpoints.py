"""Tiny checkpoints stored in four bits as GPTQ and AWQ publish them, and what they stand for."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fp8_checkpoints import store

GROUP = 32
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
}  # fmt: skip


def quantised_in_four_bits(source: Path, folder: Path, method: str) -> tuple[Path, Path]:
    """A checkpoint whose projections are stored in four bits, and the float16 one that it stands for."""
    stored, whole = (Path(shutil.copytree(source, folder / name)) for name in (method, "whole"))
    weights = {
        name: weight.half() for name, weight in load_file(source / "model.safetensors").items()
    }
    packed = dict(weights)
    for name in [name for name in weights if "_proj" in name]:
        values, zeros, scales = _quantised(weights[name].float().T)
        each = scales.repeat_interleave(GROUP, 0), zeros.repeat_interleave(GROUP, 0)
        weights[name] = ((values - each[1]) * each[0]).T.half().contiguous()
        del packed[name]
        packed |= {
            f"{name.removesuffix('weight')}{part}": tensor
            for part, tensor in _PACK[method](values, zeros, scales.half()).items()
        }
    save_file(packed, stored / "model.safetensors", metadata={"format": "pt"})
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    for path in (stored, whole):
        _set_dtype(path)
    return store(stored, SETTINGS[method]), whole


def _set_dtype(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"float16"'))


def _quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of [inputs, outputs]: values 0 to 15, and for each group of inputs the zeros and scales [groups, outputs]."""
    groups = weight.view(-1, GROUP, weight.shape[1])
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(1, 15)
    values = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return values.view(weight.shape), zeros, scales


def _pack(values: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Eight values of a row in an int32, the first of `order` lowest: [rows, columns] to [rows, columns / 8]."""
    eights = values.long().view(values.shape[0], -1, 8)[:, :, order]
    words = (eights << (4 * torch.arange(8))).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def _gptq(
    values: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor
) -> dict[str, torch.Tensor]:
    straight = list(range(8))
    return {
        "qweight": _pack(values.T, straight).T.contiguous(),
        "qzeros": _pack(zeros - 1, straight),  # as its first format has it
        "scales": scales,
        "g_idx": (torch.arange(values.shape[0]) // GROUP).int(),
    }


def _awq(
    values: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {
        "qweight": _pack(values, _AWQ_ORDER),
        "qzeros": _pack(zeros, _AWQ_ORDER),
        "scales": scales,
    }


_PACK = {"gptq": _gptq, "awq": _awq}
