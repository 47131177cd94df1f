"""Filling one rank's part of a model from the files: every tensor's slice to its place, whatever it is stored as."""

import re
from collections.abc import Callable
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


def fill(
    model: Any,
    parts: dict[str, Slice],
    files: Arriving,
    device: torch.device,
    take_layer: Callable[[int], None] | None = None,
) -> None:
    """Read this rank's slices into the parameters, from each file once it is there.

    Args:
        model: its parameters are on `device`, or on meta: these get memory when their first bytes are to be read.
        parts: names the parameters that are not whole.
        files: of the model.
        device: where to.
        take_layer: called with the number of each decoder layer once all of it is read; what it does not keep
            of the layer is let go of.

    Raises:
        ModelError: the files do not belong to config.json; or the error of who fills the folder.
    """
    filler = _Filler(_Targets(model, parts, device, take_layer), files.folder())
    # In order, a layer that two files hold is completed before the next is begun.
    paths = files.weight_files(in_order=take_layer is not None)
    for name, tensor in load_weights(
        paths, device=device, slicer=filler.slice_of, destination=filler.destination
    ):
        filler.take(name, tensor)
        del tensor  # may be all that keeps a layer that is done with
    filler.check_complete()


def give_memory(parameter: nn.Parameter, device: torch.device) -> None:
    """Put real memory under a parameter on meta, wherever in the model it is, tied or not."""
    real = torch.empty_like(parameter, device=device)
    swap: Any = torch.utils.swap_tensors
    swap(parameter, nn.Parameter(real, requires_grad=False))


class _Filler:
    """Says what of each tensor is read, and puts it in its place."""

    def __init__(self, targets: "_Targets", folder: Path) -> None:
        self._targets = targets
        self._folder = folder
        self._scales = BlockScales()
        self._shapes: dict[str, tuple[int, ...]] = {}

    def slice_of(self, name: str, shape: tuple[int, ...]) -> Slice | None:
        """Return what of a tensor is read; None for all of it."""
        if name.endswith(SCALE_SUFFIX):
            return None  # small, and a slice of the weight may need any of it
        found = self._targets.find(name)
        if found is None or name in self._shapes:  # no use for it, or for a second copy
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
        if found is None or (found[0].shape, found[0].dtype) != (shape, dtype):
            return None
        return self._targets.memory(name)

    def take(self, name: str, tensor: Tensor) -> None:
        """Put what was read in its place, or keep it until what belongs to it is read."""
        is_scale = name.endswith(SCALE_SUFFIX)
        name = name.removesuffix(SCALE_SUFFIX)
        found = self._targets.find(name)
        if found is None or not tensor.numel():
            return
        like, part = found
        ready: Tensor | None = tensor
        if is_scale:
            self._scales.add_scale(name, tensor)
        elif tensor.dtype == torch.float8_e4m3fn:
            self._scales.add_weight(name, tensor, self._shapes[name], part)
        if is_scale or tensor.dtype == torch.float8_e4m3fn:
            ready = self._scales.take(name, like.dtype)
        if ready is None:
            return
        target = self._targets.memory(name)
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

    def __init__(
        self,
        model: Any,
        parts: dict[str, Slice],
        device: torch.device,
        take_layer: Callable[[int], None] | None,
    ) -> None:
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._parts = parts
        self._device = device
        self._missing = {name: self._num_pieces(name) for name in self._parameters}
        self._take_layer = take_layer
        self._layer_of: dict[str, int] = {}
        self._names_of: list[set[str]] = []
        if take_layer is not None:
            self._note_layers(model.base_model.layers)

    def _note_layers(self, layers: nn.ModuleList) -> None:
        index_of = {id(p): index for index, layer in enumerate(layers) for p in layer.parameters()}
        self._names_of = [set() for _ in layers]
        for name, parameter in self._parameters.items():
            if (index := index_of.get(id(parameter))) is not None:
                self._layer_of[name] = index
                self._names_of[index].add(name)

    def _num_pieces(self, name: str) -> int:
        """Tensors that fill one parameter: experts come one by one."""
        parameter = self._parameters[name]
        if name.endswith(".experts.gate_up_proj"):
            return 2 * parameter.shape[0]
        return parameter.shape[0] if name.endswith(".experts.down_proj") else 1

    def find(self, name: str) -> tuple[Tensor, Slice | None] | None:
        """Return the parameter, or what of it one tensor fills, and the slice; None for a tensor without use."""
        match = _EXPERT.fullmatch(name)
        if match is None:
            parameter = self._parameters.get(name)
            return None if parameter is None else (parameter.data, self._parts.get(name))
        owner, index = _owner(name), int(match[2])
        if owner not in self._parameters or index >= self._parameters[owner].shape[0]:
            return None
        target, part = self._parameters[owner].data[index], self._parts.get(owner)
        if match[3] == "down":
            return target, None if part is None else part._replace(dim=1)
        half = target.shape[0] // 2
        return (target[:half] if match[3] == "gate" else target[half:]), part

    def memory(self, name: str) -> Tensor:
        """Return the memory that a tensor of a known name fills."""
        parameter = self._parameters[_owner(name)]
        if parameter.is_meta:
            give_memory(parameter, self._device)
        found = self.find(name)
        assert found is not None, f"{name} goes nowhere"
        return found[0]

    def filled(self, name: str) -> None:
        """Note that a tensor has arrived, experts one by one or all; give away the layer that it completes."""
        owner = _owner(name)
        self._missing[owner] = 0 if name == owner else self._missing[owner] - 1
        index = self._layer_of.get(owner)
        if self._missing[owner] > 0 or index is None or self._take_layer is None:
            return
        names = self._names_of[index]
        if any(self._missing[name] > 0 for name in names):
            return
        for name in names:
            del self._parameters[name], self._layer_of[name]
        self._take_layer(index)

    def missing(self) -> list[str]:
        """Parameters that the files do not fill."""
        return sorted(name for name, count in self._missing.items() if count > 0)


def _owner(name: str) -> str:
    """Return the name of the parameter that a tensor is in."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name
    return f"{match[1]}.{'down' if match[3] == 'down' else 'gate_up'}_proj"
