"""Filling one rank's part of a model from the files: every tensor's slice to its place, whatever it is stored as."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference.arriving import Arriving
from inference.errors import ModelError
from inference.fp8_blocks import SCALE_SUFFIX, BlockScales
from inference.load_weights import load_weights
from inference.weight_reader import Slice

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def fill(model: Any, parts: dict[str, Slice], files: Arriving) -> None:
    """Read this rank's slices into the parameters, from each file once it is there.

    `parts` names the parameters that are not whole.

    Raises:
        ModelError: the files do not belong to config.json; or the error of who fills the folder.
    """
    filler = _Filler(model, parts, files.folder())
    device = next(model.parameters()).device
    for name, tensor in load_weights(
        files.weight_files(), device=device, slicer=filler.slice_of, destination=filler.destination
    ):
        filler.take(name, tensor)
    filler.check_complete()


class _Filler:
    """Says what of each tensor is read, and puts it in its place."""

    def __init__(self, model: Any, parts: dict[str, Slice], folder: Path) -> None:
        self._targets = _Targets(model, parts)
        self._folder = folder
        self._scales = BlockScales()
        self._shapes: dict[str, tuple[int, ...]] = {}

    def slice_of(self, name: str, shape: tuple[int, ...]) -> Slice | None:
        """Return what of a tensor is read; None for all of it."""
        if name.endswith(SCALE_SUFFIX):
            return None  # small, and a slice of the weight may need any of it
        found = self._targets.find(name)
        if found is None:
            return Slice(0, 0, 0) if shape else None  # nothing of it is read
        target, part = found
        here = part.shape_of(shape) if part and len(shape) > part.dim else shape
        if here != tuple(target.shape) or (part and part.stop > shape[part.dim]):
            raise ModelError(
                f"{self._folder}: {name} has shape {shape}, of which this rank wants "
                f"{tuple(target.shape)}; the files do not belong to this config.json"
            )
        self._shapes[name] = shape
        return part

    def destination(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return the memory that is read into, where nothing is to be converted."""
        found = self._targets.find(name)
        return found[0] if found and found[0].dtype == dtype else None

    def take(self, name: str, tensor: Tensor) -> None:
        """Put what was read in its place, or keep it until what belongs to it is read."""
        ready: Tensor | None = tensor
        is_scale = name.endswith(SCALE_SUFFIX)
        name = name.removesuffix(SCALE_SUFFIX)
        found = self._targets.find(name)
        if found is None:
            return
        target, part = found
        if is_scale:
            self._scales.add_scale(name, tensor)
        elif tensor.dtype == torch.float8_e4m3fn:
            self._scales.add_weight(name, tensor, self._shapes[name], part)
        if is_scale or tensor.dtype == torch.float8_e4m3fn:
            ready = self._scales.take(name, target.dtype)
        if ready is None:
            return
        if ready.data_ptr() != target.data_ptr():
            target.copy_(ready)
        self._targets.filled(name)

    def check_complete(self) -> None:
        """Raise ModelError if a parameter has not been filled."""
        self._scales.check_complete()
        missing = self._targets.missing()
        if missing:
            raise ModelError(
                f"{self._folder}: {len(missing)} weights with missing keys, first {missing[0]}; "
                f"the files do not belong to this config.json"
            )


class _Targets:
    """Where each tensor of the files goes: the memory to fill, and the slice of the tensor that fills it."""

    def __init__(self, model: Any, parts: dict[str, Slice]) -> None:
        # A head tied to the embedding is not among them: a copy of it in the files is not read.
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._parts = parts
        self._missing = {name: self._num_pieces(name) for name in self._parameters}

    def _num_pieces(self, name: str) -> int:
        """Tensors that fill one parameter: experts come one by one."""
        parameter = self._parameters[name]
        if name.endswith(".experts.gate_up_proj"):
            return 2 * parameter.shape[0]
        return parameter.shape[0] if name.endswith(".experts.down_proj") else 1

    def find(self, name: str) -> tuple[Tensor, Slice | None] | None:
        """Return the memory and the slice of one tensor; None for a tensor the model has no use for."""
        match = _EXPERT.fullmatch(name)
        if match is None:
            parameter = self._parameters.get(name)
            return None if parameter is None else (parameter.data, self._parts.get(name))
        experts, index, kind = match[1], int(match[2]), match[3]
        owner = f"{experts}.down_proj" if kind == "down" else f"{experts}.gate_up_proj"
        if owner not in self._parameters or index >= self._parameters[owner].shape[0]:
            return None
        target, part = self._parameters[owner].data[index], self._parts[owner]
        if kind == "down":
            return target, part._replace(dim=1)
        half = target.shape[0] // 2
        return (target[:half] if kind == "gate" else target[half:]), part

    def filled(self, name: str) -> None:
        """Note that a tensor has arrived."""
        match = _EXPERT.fullmatch(name)
        if match is not None:
            name = f"{match[1]}.{'down' if match[3] == 'down' else 'gate_up'}_proj"
        if name in self._missing:
            self._missing[name] -= 1

    def missing(self) -> list[str]:
        """Parameters that the files do not fill."""
        return sorted(name for name, count in self._missing.items() if count > 0)
