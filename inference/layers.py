"""FusedLayer: one decoder layer of the Llama family, on fused weights and fused operations.

T tokens   D hidden size   I intermediate size   N query heads   K KV heads   H head dim
E = (N + 2K) H, the width of fused QKV
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.batch import Batch
from inference.errors import EngineConfigError
from inference.experts import Experts
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


def _fuse(modules: list[Any], is_fp8: bool) -> Linear:
    """Return one linear that gives the outputs of several side by side."""
    weight = torch.cat([module.weight.data for module in modules])
    biases = [module.bias for module in modules if module.bias is not None]
    bias = torch.cat([b.data for b in biases]) if biases else None
    return quantised(weight, bias) if is_fp8 else Linear(weight, bias)


def _reduced(module: Any, is_fp8: bool, ranks: TensorParallel) -> Linear | RowLinear:
    return _fuse([module], is_fp8) if ranks.size == 1 else RowLinear(module, is_fp8, ranks)


class FusedLayer:
    """Attention and MLP of one layer; norms are fused with the residual additions around them."""

    def __init__(
        self,
        layer: Any,
        index: int,
        config: Any,
        ops: ModuleType,
        is_fp8: bool,
        ranks: TensorParallel,
    ) -> None:
        self.index = index
        self._ops = ops
        self._is_fp8 = is_fp8
        self._options: dict[str, bool] = {"is_fp8": True} if is_fp8 else {}
        attention, mlp = layer.self_attn, layer.mlp
        self._qkv = _fuse([attention.q_proj, attention.k_proj, attention.v_proj], is_fp8)
        self._o = _reduced(attention.o_proj, is_fp8, ranks)
        self._q_norm = getattr(attention, "q_norm", None)
        self._k_norm = getattr(attention, "k_norm", None)
        self._input_norm = layer.input_layernorm
        self._post_norm = layer.post_attention_layernorm
        self._eps: float = layer.input_layernorm.variance_epsilon
        self._scale: float = float(attention.scaling)
        self.window = _window(attention, config)
        self._mlp: Any = None
        if hasattr(mlp, "gate_proj"):
            self._gate_up = _fuse([mlp.gate_proj, mlp.up_proj], is_fp8)
            self._down = _reduced(mlp.down_proj, is_fp8, ranks)
        else:
            self._mlp = Experts(mlp, ops, is_fp8, ranks)

    @property
    def num_bytes(self) -> int:
        """Of the weights here, but for norms."""
        parts = [self._mlp] if self._mlp is not None else [self._gate_up, self._down]
        return sum(part.num_bytes for part in (self._qkv, self._o, *parts))

    def first_norm(self, residual_TD: Tensor) -> Rows:
        """Return this layer's input when it is the first layer."""
        return self._norm(residual_TD, None, self._input_norm.weight, self._is_fp8)

    def next_norm(self, out_TD: Tensor, residual_TD: Tensor) -> Rows:
        """Add the layer before's output to the residual, in place, and return this layer's input."""
        return self._norm(out_TD, residual_TD, self._input_norm.weight, self._is_fp8)

    def forward(
        self,
        x: Rows,
        residual_TD: Tensor,
        batch: Batch,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return the layer's output [T,D], not yet added to the residual; the attention's is, in place."""
        k_cache, v_cache = cache
        ops = self._ops
        q_TNH = ops.rope_store(
            self._qkv(x),
            None if self._q_norm is None else self._q_norm.weight,
            None if self._k_norm is None else self._k_norm.weight,
            self._eps,
            cos,
            sin,
            batch,
            k_cache,
            v_cache,
        )
        attended = ops.attention(
            q_TNH, k_cache, v_cache, batch, scale=self._scale, window=self.window
        ).flatten(1)
        out_TD = self._o(ops.quantise_rows(attended) if self._is_fp8 else attended)
        is_fp8 = self._is_fp8 and self._mlp is None
        x = self._norm(out_TD, residual_TD, self._post_norm.weight, is_fp8)
        if self._mlp is not None:
            assert isinstance(x, Tensor)
            out: Tensor = self._mlp(x)
            return out
        return self._down(ops.silu_mul(self._gate_up(x), **self._options))

    def _norm(
        self, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, is_fp8: bool
    ) -> Rows:
        options = {"is_fp8": True} if is_fp8 else {}
        rows: Rows = self._ops.add_rms_norm(x_TD, residual_TD, weight_D, self._eps, **options)
        return rows


def _window(attention: Any, config: Any) -> int:
    if config.model_type == "mistral":
        return int(getattr(config, "sliding_window", None) or 0)
    return int(getattr(attention, "sliding_window", None) or 0)


def take_layer(
    model: Any, index: int, ops: ModuleType, is_fp8: bool, ranks: TensorParallel
) -> FusedLayer:
    """Take a layer out of a transformers model; weights of it that the fused layer has no use for are let go of."""
    base, config = model.base_model, model.config.get_text_config()
    taken = FusedLayer(base.layers[index], index, config, ops, is_fp8, ranks)
    base.layers[index] = torch.nn.Identity()
    return taken
