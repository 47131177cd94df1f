"""FusedLayer: one decoder layer of the Llama family, on fused weights and fused operations.

T tokens   D hidden size   I intermediate size   N query heads   K KV heads   H head dim
E = (N + 2K) H, the width of fused QKV
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from inference.batch import Batch
from inference.experts import Experts
from inference.linears import Rows, can_be_side_by_side, reduced, side_by_side
from inference.tensor_parallel import TensorParallel


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
        self._qkv = side_by_side([attention.q_proj, attention.k_proj, attention.v_proj], is_fp8)
        self._o = reduced(attention.o_proj, is_fp8, ranks)
        self._q_norm = getattr(attention, "q_norm", None)
        self._k_norm = getattr(attention, "k_norm", None)
        self._input_norm = layer.input_layernorm
        self._post_norm = layer.post_attention_layernorm
        self._eps: float = layer.input_layernorm.variance_epsilon
        self._scale: float = float(attention.scaling)
        self.window = _window(attention, config)
        self._mlp: Any = None
        if hasattr(mlp, "gate_proj"):
            self._gate_up = side_by_side([mlp.gate_proj, mlp.up_proj], is_fp8)
            self._down = reduced(mlp.down_proj, is_fp8, ranks)
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


def can_be_fused(layer: Any, dtype: torch.dtype) -> bool:
    """Whether a layer whose linears bitsandbytes quantised can become a fused one."""
    attention, mlp = layer.self_attn, layer.mlp
    groups = (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )
    return all(can_be_side_by_side(group, dtype) for group in groups)


def take_layer(
    model: Any, index: int, ops: ModuleType, is_fp8: bool, ranks: TensorParallel
) -> FusedLayer:
    """Take a layer out of a transformers model; weights of it that the fused layer has no use for are let go of."""
    base, config = model.base_model, model.config.get_text_config()
    taken = FusedLayer(base.layers[index], index, config, ops, is_fp8, ranks)
    base.layers[index] = torch.nn.Identity()
    return taken
