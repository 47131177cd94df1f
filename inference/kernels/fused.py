"""The engine's operations on Triton kernels: the same functions as `kernels.plain`.

T tokens   D hidden size   I intermediate size   N query heads   K KV heads   H head dim
"""

import torch
import triton
from torch import Tensor

from inference.batch import Batch
from inference.kernels import plain
from inference.kernels.elementwise import (
    add_rms_norm_kernel,
    quantise_rows_kernel,
    rope_store_kernel,
    silu_mul_fp8_kernel,
    silu_mul_kernel,
)
from inference.kernels.fused_attention import attention as attention
from inference.kernels.fused_experts import experts as experts

Rows8 = tuple[Tensor, Tensor]
"""Rows in e4m3 and their fp32 scales [T,1]."""

token_ids = plain.token_ids
embed = plain.embed


def add_rms_norm(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    is_fp8: bool = False,
) -> Tensor | Rows8:
    """Add x to the residual in place, if there is one, and return the sum's RMSNorm, quantised if asked."""
    num_rows, width = x_TD.shape
    out = torch.empty_like(x_TD, dtype=torch.float8_e4m3fn if is_fp8 else None)
    scale = _row_scales(x_TD) if is_fp8 else x_TD
    pad = triton.next_power_of_2(width)
    add_rms_norm_kernel[(num_rows,)](
        x_TD,
        x_TD if residual_TD is None else residual_TD,
        weight_D,
        out,
        scale,
        eps,
        D=width,
        D_PAD=pad,
        HAS_RESIDUAL=residual_TD is not None,
        IS_FP8=is_fp8,
        num_warps=_num_warps(pad),
    )
    return (out, scale) if is_fp8 else out


def silu_mul(gate_up_TI: Tensor, is_fp8: bool = False) -> Tensor | Rows8:
    """[T,2I] -> [T,I]: silu of the first half times the second, quantised if asked."""
    num_rows, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
    if is_fp8:
        out = gate_up_TI.new_empty(num_rows, width, dtype=torch.float8_e4m3fn)
        scale = _row_scales(gate_up_TI)
        pad = triton.next_power_of_2(width)
        silu_mul_fp8_kernel[(num_rows,)](
            gate_up_TI, out, scale, WIDTH=width, WIDTH_PAD=pad, num_warps=_num_warps(pad)
        )
        return out, scale
    out = gate_up_TI.new_empty(num_rows, width)
    block = min(2048, triton.next_power_of_2(width))
    silu_mul_kernel[(num_rows, triton.cdiv(width, block))](
        gate_up_TI, out, WIDTH=width, BLOCK=block, num_warps=4
    )
    return out


def quantise_rows(x_TD: Tensor) -> Rows8:
    """Scale each row to e4m3."""
    num_rows, width = x_TD.shape
    out = torch.empty_like(x_TD, dtype=torch.float8_e4m3fn)
    scale = _row_scales(x_TD)
    pad = triton.next_power_of_2(width)
    quantise_rows_kernel[(num_rows,)](
        x_TD, out, scale, D=width, D_PAD=pad, num_warps=_num_warps(pad)
    )
    return out, scale


def rope_store(
    qkv_TE: Tensor,
    q_weight_H: Tensor | None,
    k_weight_H: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    batch: Batch,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Split fused QKV, norm and rotate q and k, store k and v in the cache; return q [T,N,H]."""
    num_tokens, width = qkv_TE.shape
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    q = qkv_TE.new_empty(num_tokens, num_heads, head_dim)
    rope_store_kernel[(num_tokens,)](
        qkv_TE,
        cos if q_weight_H is None else q_weight_H,
        cos if k_weight_H is None else k_weight_H,
        cos,
        sin,
        batch.positions,
        batch.slot_mapping,
        q,
        k_cache,
        v_cache,
        eps,
        N=num_heads,
        N_PAD=triton.next_power_of_2(num_heads),
        K=num_kv_heads,
        K_PAD=triton.next_power_of_2(num_kv_heads),
        H=head_dim,
        HALF_PAD=triton.next_power_of_2(head_dim // 2),
        S=block_size,
        HAS_NORM=q_weight_H is not None,
        num_warps=4,
        enable_fp_fusion=False,  # or products in bf16 are summed without being rounded
    )
    return q


store = plain.store


def _row_scales(x_TD: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], 1, dtype=torch.float32)


def _num_warps(width: int) -> int:
    return min(16, max(1, width // 1024))
