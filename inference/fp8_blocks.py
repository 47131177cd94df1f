"""Checkpoints stored as fp8 in blocks, read in slices: a rank makes its part full precision while it reads.

A weight [R,C] in e4m3 comes with one scale a block, [R / block rows, C / block columns], under its name and
`_scale_inv`. A slice needs the scales of the blocks it touches, so its bounds may lie within a block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from inference.errors import ModelError
from inference.weight_reader import Slice

SCALE_SUFFIX = "_scale_inv"


class _Weight(NamedTuple):
    tensor_8: Tensor
    shape: tuple[int, ...]
    """Of the whole weight."""

    part: Slice | None


class BlockScales:
    """Brings weights and their scales together, whichever is read first."""

    def __init__(self) -> None:
        self._weights: dict[str, _Weight] = {}
        self._scales: dict[str, Tensor] = {}

    def add_scale(self, name: str, scale: Tensor) -> None:
        """Take the whole scale of the weight of this name."""
        self._scales[name] = scale

    def add_weight(
        self, name: str, tensor_8: Tensor, shape: tuple[int, ...], part: Slice | None
    ) -> None:
        """Take a slice of a weight; `shape` is the whole one's."""
        self._weights[name] = _Weight(tensor_8, shape, part)

    def take(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return the slice in full precision once both are here, and forget them.

        Raises:
            ModelError: the scales do not divide the weight into blocks.
        """
        if name not in self._weights or name not in self._scales:
            return None
        weight, scale = self._weights.pop(name), self._scales.pop(name)
        return dequantised(name, weight.tensor_8, scale, weight.shape, weight.part).to(dtype)

    def check_complete(self) -> None:
        """Raise ModelError if a weight has no scale or a scale no weight."""
        alone = sorted(self._weights | self._scales)
        if alone:
            missing = "scale" if alone[0] in self._weights else "weight"
            raise ModelError(
                f"{alone[0]}: stored as fp8 in blocks but its {missing} is missing, and of "
                f"{len(alone) - 1} more; fetch the whole model again"
            )


def dequantised(
    name: str, tensor_8: Tensor, scale: Tensor, shape: tuple[int, ...], part: Slice | None
) -> Tensor:
    """Return a slice of a weight in fp32, given the scales of the whole weight.

    Raises:
        ModelError: the scales do not divide the weight into blocks.
    """
    if scale.dim() != 2 or len(shape) != 2 or any(shape[d] % scale.shape[d] for d in (0, 1)):
        raise ModelError(
            f"{name}: a weight of shape {shape} cannot be divided into blocks by scales of shape "
            f"{tuple(scale.shape)}; the files do not belong together"
        )
    value = tensor_8.float()
    blocks = []
    for dim in (0, 1):
        first, stop = (part.start, part.stop) if part and part.dim == dim else (0, shape[dim])
        at = torch.arange(first, stop, device=scale.device)
        blocks.append(at // (shape[dim] // scale.shape[dim]))
    return value.mul_(scale.float()[blocks[0][:, None], blocks[1]])
