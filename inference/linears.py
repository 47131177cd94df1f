"""Linears of the fused layers: full precision, e4m3, four bits, and those whose inputs are partitioned."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.errors import EngineConfigError
from inference.kernels.plain import FP8_MAX
from inference.tensor_parallel import TensorParallel

_CUDA_MULTIPLE = 16  # of the widths of an e4m3 product
_ELEMENTS_AT_ONCE = 1 << 22  # of a weight that is being quantised

Rows = Tensor | tuple[Tensor, Tensor]
"""Rows as they are, or in e4m3 with their fp32 scales."""


class Linear:
    """x @ weight.T + bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Rows) -> Tensor:
        """[T, in] -> [T, out]"""
        assert isinstance(x, Tensor), "rows in e4m3 given to a full-precision weight"
        return F.linear(x, self._weight, self._bias)

    def summed_by(self, ranks: TensorParallel, x: Rows) -> Tensor:
        """[T, in here] -> [T, out], the sum over ranks that hold other inputs; without a bias."""
        if isinstance(x, Tensor) and (room := ranks.room(x, len(self._weight))) is not None:
            return ranks.all_reduce(torch.mm(x, self._weight.t(), out=room))
        return ranks.all_reduce(self(x))


class Linear8(Linear):
    """The same with weight and rows in e4m3, one scale per row and one per output."""

    def __init__(
        self, weight_8: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Take weight_8 [out, in], scale [1, out]. Raises EngineConfigError: a width no device multiplies."""
        num_outputs, width = weight_8.shape
        if weight_8.is_cuda:
            if width % _CUDA_MULTIPLE:
                raise EngineConfigError(
                    f"fp8: a layer's input width of {width} is not a multiple of {_CUDA_MULTIPLE}, "
                    f"as the device's product needs; use model.quantization none"
                )
            if missing := -num_outputs % _CUDA_MULTIPLE:
                padded = F.pad(weight_8.view(torch.uint8), (0, 0, 0, missing))
                weight_8, scale = padded.view(weight_8.dtype), F.pad(scale, (0, missing))
        super().__init__(weight_8, bias)
        self._num_outputs = num_outputs
        self._scale = scale
        self._dtype = dtype

    @property
    def num_bytes(self) -> int:
        """Of the weights and their scales."""
        return super().num_bytes + self._scale.nbytes

    def __call__(self, x: Rows) -> Tensor:
        """([T, in] e4m3, [T,1] scales) -> [T, out]"""
        rows, row_scale = x
        if not rows.is_cuda:  # there is no such product on the CPU: the same numbers, in fp32
            product = (rows.float() @ self._weight.float().t()) * row_scale * self._scale
            out = product.to(self._dtype)
            return out if self._bias is None else out + self._bias
        out = torch._scaled_mm(
            rows,
            self._weight.t(),
            scale_a=row_scale,
            scale_b=self._scale,
            out_dtype=self._dtype,
            use_fast_accum=True,
        )
        if out.shape[1] > self._num_outputs:
            out = out[:, : self._num_outputs].contiguous()
        return out if self._bias is None else out + self._bias


class Linear4(Linear):
    """The same with a weight in four bits as bitsandbytes keeps it, two values a byte and a scale for each block."""

    def __init__(self, packed: Tensor, state: Any, bias: Tensor | None) -> None:
        """`state`: bitsandbytes' QuantState of the weight."""
        import bitsandbytes

        library: Any = bitsandbytes
        super().__init__(packed, bias)
        self._state = state
        self._multiply = library.matmul_4bit

    @property
    def num_bytes(self) -> int:
        """Of the weights and their scales."""
        return super().num_bytes + int(self._state.absmax.nbytes)

    def __call__(self, x: Rows) -> Tensor:
        """[T, in] -> [T, out]"""
        assert isinstance(x, Tensor), "rows in e4m3 given to a weight in four bits"
        out: Tensor = self._multiply(x, self._weight.t(), quant_state=self._state, bias=self._bias)
        return out


class RowLinear:
    """A linear whose inputs are partitioned: each rank's product is a term of a sum, and the bias comes after."""

    def __init__(self, module: Any, is_fp8: bool, ranks: TensorParallel) -> None:
        weight = module.weight.data
        self._product = quantised(weight) if is_fp8 else Linear(weight)
        self._bias: Tensor | None = None if module.bias is None else module.bias.data
        self._ranks = ranks

    @property
    def num_bytes(self) -> int:
        """Of the weights here."""
        return self._product.num_bytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Rows) -> Tensor:
        """[T, in here] -> [T, out], the same on every rank."""
        out = self._product.summed_by(self._ranks, x)
        return out if self._bias is None else out.add_(self._bias)


def quantised(weight: Tensor, bias: Tensor | None = None) -> Linear8:
    """Quantise a weight [out, in] to e4m3 by output, some outputs at a time: the rest of it is never in fp32."""
    weight = weight.detach()
    weight_8 = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = weight.new_empty(len(weight), 1, dtype=torch.float32)
    num_rows = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    parts = (torch.split(tensor, num_rows) for tensor in (weight, weight_8, scale))
    for part, part_8, part_scale in zip(*parts, strict=True):
        part_scale.copy_(part.abs().amax(dim=1, keepdim=True).float() / FP8_MAX).clamp_(min=1e-12)
        part_8.copy_((part.float() / part_scale).clamp(-FP8_MAX, FP8_MAX))
    return Linear8(weight_8, scale.t().contiguous(), bias, weight.dtype)


def side_by_side(modules: Sequence[Any], is_fp8: bool) -> Linear:
    """Return one linear that gives the outputs of several, one after the other; their weights may be taken away."""
    biases = [module.bias for module in modules if module.bias is not None]
    bias = torch.cat([b.data for b in biases]) if biases else None
    weight = torch.cat([module.weight.data for module in modules])
    if _state(modules[0]) is not None:
        state = _joined(list(map(_state, modules)))
        for module in modules:
            module.weight = None  # it refers to its module: a cycle, which would live for a while
        return Linear4(weight, state, bias)
    return quantised(weight, bias) if is_fp8 else Linear(weight, bias)


def reduced(module: Any, is_fp8: bool, ranks: TensorParallel) -> Linear | RowLinear:
    """Return the linear that a layer's output comes from, over ranks a sum."""
    return side_by_side([module], is_fp8) if ranks.size == 1 else RowLinear(module, is_fp8, ranks)


def can_be_side_by_side(modules: Sequence[Any], dtype: torch.dtype) -> bool:
    """Whether modules that bitsandbytes may have quantised can become one linear whose rows are of `dtype`."""
    states = list(map(_state, modules))
    if all(state is None for state in states):
        return all(type(module) is torch.nn.Linear for module in modules)
    return all(
        state is not None
        and module.compute_dtype == dtype
        and (module.bias is None or module.bias.dtype == dtype)
        and tuple(state.shape) == (module.out_features, module.in_features)
        and module.in_features % state.blocksize == 0
        and (state.quant_type, state.blocksize) == (states[0].quant_type, states[0].blocksize)
        for module, state in zip(modules, states, strict=True)
    )


def _state(module: Any) -> Any:
    """Return how bitsandbytes keeps a module's weight in four bits; None: it does not."""
    return getattr(module.weight, "quant_state", None)


def _joined(states: list[Any]) -> Any:
    first = states[0]
    return type(first)(
        absmax=torch.cat(list(map(_scales, states))),
        shape=torch.Size((sum(state.shape[0] for state in states), first.shape[1])),
        code=first.code,
        blocksize=first.blocksize,
        quant_type=first.quant_type,
        dtype=first.dtype,
    )


def _scales(state: Any) -> Tensor:
    """Return the scales of a weight's blocks in fp32, also of what has them in eight bits."""
    if not state.nested:
        return cast(Tensor, state.absmax)
    import bitsandbytes

    library: Any = bitsandbytes.functional
    scales: Tensor = library.dequantize_blockwise(state.absmax, state.state2)
    return (scales + cast(Tensor, state.offset)).float()
