"""The engine's operations in torch: the CPU's, and what the Triton kernels are tested against.

T tokens   D hidden size   I intermediate size   N query heads   K KV heads   H head dim
S tokens in one block   B decoding rows   L tokens of the longest row
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.batch import Batch
from inference.kernels.plain_attention import attention as attention

FP8_MAX = 448.0
"""Largest number in e4m3."""

Rows8 = tuple[Tensor, Tensor]
"""Rows in e4m3 and their fp32 scales [T,1]."""


def token_ids(batch: Batch, last_token: Tensor) -> Tensor:
    """Return the step's tokens [T]; a negative source names the slot whose last token is read."""
    source_T = batch.token_source.long()
    slots_T = (-source_T - 1).clamp(min=0)
    return torch.where(source_T >= 0, source_T, last_token[slots_T].long())


def embed(batch: Batch, last_token: Tensor, weight_VD: Tensor) -> Tensor:
    """Return the rows [T,D] of the step's tokens."""
    return F.embedding(token_ids(batch, last_token), weight_VD)


def add_rms_norm(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    is_fp8: bool = False,
) -> Tensor | Rows8:
    """Add x to the residual in place, if there is one, and return the sum's RMSNorm, quantised if asked."""
    if residual_TD is not None:
        residual_TD.add_(x_TD)
        x_TD = residual_TD
    out = _rms_norm(x_TD, weight_D, eps)
    return quantise_rows(out) if is_fp8 else out


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    value = x.float()
    value = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
    return weight * value.to(x.dtype)


def silu_mul(gate_up_TI: Tensor, is_fp8: bool = False) -> Tensor | Rows8:
    """[T,2I] -> [T,I]: silu of the first half times the second, quantised if asked."""
    gate, up = gate_up_TI.chunk(2, dim=-1)
    out = F.silu(gate) * up
    return quantise_rows(out) if is_fp8 else out


def quantise_rows(x_TD: Tensor) -> Rows8:
    """Scale each row to e4m3."""
    scale_T1 = (x_TD.float().abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=1e-12)
    rows = (x_TD.float() / scale_T1).clamp(-FP8_MAX, FP8_MAX)
    return rows.to(torch.float8_e4m3fn), scale_T1


class ExpertWeights(NamedTuple):
    """One matrix of every expert, [E,out,in]: as it is, or in e4m3 with its fp32 scales [E,out]."""

    weight: Tensor
    scale: Tensor | None = None

    def product(self, rows: Tensor, expert: int) -> Tensor:
        """[R,in] -> [R,out]"""
        if self.scale is None:
            return F.linear(rows, self.weight[expert])
        rows_8, row_scale = quantise_rows(rows)
        product = (rows_8.float() @ self.weight[expert].float().t()) * row_scale
        return (product * self.scale[expert]).to(rows.dtype)


def experts(
    x_TD: Tensor,
    logits_TE: Tensor,
    top_k: int,
    is_normed: bool,
    gate_up: ExpertWeights,
    down: ExpertWeights,
) -> Tensor:
    """Route each token to its experts and return the weighted sum of what they make of it, [T,D]."""
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    share_TK, expert_TK = torch.topk(F.softmax(logits_TE, dim=-1, dtype=wide), top_k, dim=-1)
    if is_normed:
        share_TK = share_TK / share_TK.sum(dim=-1, keepdim=True)
    share_TK = share_TK.to(logits_TE.dtype)
    out_TKD = x_TD.new_zeros(*expert_TK.shape, x_TD.shape[1])
    for expert in range(gate_up.weight.shape[0]):
        token, place = torch.where(expert_TK == expert)
        if len(token):
            inner = silu_mul(gate_up.product(x_TD[token], expert))
            assert isinstance(inner, Tensor)
            share = share_TK[token, place, None]
            out_TKD[token, place] = down.product(inner, expert) * share
    return out_TKD.sum(dim=1)


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
    """Split fused QKV, norm and rotate q and k, store k and v in the cache [blocks,K,S,H]; return q [T,N,H].

    `cos` and `sin` are tables [positions, H/2].
    """
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    num_tokens = qkv_TE.shape[0]
    heads = qkv_TE.view(num_tokens, -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
    v = heads[:, num_heads + num_kv_heads :]
    if q_weight_H is not None and k_weight_H is not None:
        q = _rms_norm(q, q_weight_H, eps)
        k = _rms_norm(k, k_weight_H, eps)
    positions = batch.positions.long()
    cos_T1H = cos[positions][:, None].to(q.dtype)
    sin_T1H = sin[positions][:, None].to(q.dtype)
    store(_rotate(k, cos_T1H, sin_T1H), v, batch, k_cache, v_cache)
    return _rotate(q, cos_T1H, sin_T1H)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def store(k_TKH: Tensor, v_TKH: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor) -> None:
    """Write the step's keys and values to their slots."""
    block_size = k_cache.shape[2]
    slots = batch.slot_mapping.long()
    block, offset = slots // block_size, slots % block_size
    k_cache[block, :, offset] = k_TKH.to(k_cache.dtype)
    v_cache[block, :, offset] = v_TKH.to(v_cache.dtype)
