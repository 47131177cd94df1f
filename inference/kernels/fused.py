"""The engine's operations on Triton kernels: the same functions as `kernels.plain`.

T tokens   D hidden size   I intermediate size   N query heads   K KV heads   H head dim
P attention parts
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from inference.batch import NUM_ITEMS, NUM_TILES, TILE_QUARTERS, Batch, BatchLimits
from inference.kernels import plain
from inference.kernels.decode_attention import decode_kernel
from inference.kernels.elementwise import (
    add_rms_norm_kernel,
    quantise_rows_kernel,
    rope_store_kernel,
    silu_mul_fp8_kernel,
    silu_mul_kernel,
)
from inference.kernels.fused_experts import experts as experts
from inference.kernels.tile_attention import tile_kernel

TILE_ROWS = 64
"""Least rows of a prefill or cascade tile: query tokens times the query heads of one KV head."""

Rows8 = tuple[Tensor, Tensor]
"""Rows in e4m3 and their fp32 scales [T,1]."""

embed = plain.embed


@dataclass(slots=True)
class Scratch:
    """What the attention kernels write between launches, and how many programs they run as."""

    part_out: Tensor
    part_lse: Tensor
    tickets: Tensor
    """Counters of the decode and tile launches, far apart."""

    arrivals: Tensor
    """Parts of each row and KV head that are written, while the decode kernel runs."""

    decode_programs: int
    tile_programs: int
    side_stream: Any
    """Where tiles run beside the decode kernel, with priority; None without CUDA."""


def tile_rows(group: int) -> int:
    """Rows of a tile where so many query heads share a KV head: enough for one query token."""
    return max(TILE_ROWS, int(triton.next_power_of_2(group)))


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; of the absent one that meta stands for; a few for Triton's interpreter."""
    if device.type == "meta":
        properties = triton.runtime.driver.active.utils.get_device_properties(0)
        return int(properties["multiprocessor_count"])
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def make_scratch(
    limits: BatchLimits, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> Scratch:
    """Allocate room for every part a batch within `limits` can have."""
    num_sms = num_multiprocessors(device)
    num_parts = (
        limits.max_num_items + limits.max_num_seqs + limits.tile_queries * limits.num_programs
    )
    return Scratch(
        torch.empty(num_parts, num_heads, head_dim, dtype=torch.float32, device=device),
        torch.empty(num_parts, num_heads, dtype=torch.float32, device=device),
        torch.zeros(2, 32, dtype=torch.int32, device=device),
        torch.zeros(limits.max_num_seqs, num_kv_heads, dtype=torch.int32, device=device),
        decode_programs=num_sms * DECODE_PROGRAMS_PER_SM,
        tile_programs=num_sms * TILE_PROGRAMS_PER_SM,
        side_stream=_priority_stream(device),
    )


DECODE_PROGRAMS_PER_SM = 4
DECODE_OPTIONS = {"num_warps": 4, "STAGES": 2}
DECODE_OPTIONS_FP8 = {"num_warps": 2, "STAGES": 3}
TILE_PROGRAMS_PER_SM = 2
TILE_OPTIONS = {"num_warps": 4, "STAGES": 2}


def _priority_stream(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    cuda: Any = torch.cuda
    return cuda.Stream(device, priority=-1)


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
    )
    return q


store = plain.store


def attention(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    *,
    scale: float,
    window: int = 0,
) -> Tensor:
    """Attend each token to its own sequence's tokens up to itself, the last `window` only; return [T,N,H]."""
    _, num_heads, head_dim = q_TNH.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    scratch: Scratch = batch.scratch
    out = torch.empty_like(q_TNH)
    scale_log2 = scale * math.log2(math.e)
    h_pad = max(16, triton.next_power_of_2(head_dim))
    table_stride = batch.block_table.stride(0)
    common = {
        "K": num_kv_heads,
        "G": group,
        "G_PAD": max(16, triton.next_power_of_2(group)),
        "H": head_dim,
        "H_PAD": h_pad,
        "S": block_size,
        "TILE": min(block_size, 64),
        "WINDOW": window,
    }

    if batch.is_mixed:
        with _beside(scratch.side_stream):
            tile_kernel[(scratch.tile_programs,)](
                q_TNH,
                k_cache,
                v_cache,
                batch.block_table,
                batch.tiles,
                batch.counts[NUM_TILES:],
                batch.counts[TILE_QUARTERS:],
                scratch.tickets[1],
                batch.cascade_rows,
                batch.row_part,
                batch.row_num_parts,
                out,
                scratch.part_out,
                scratch.part_lse,
                scratch.arrivals,
                scale_log2,
                table_stride,
                M=tile_rows(group),
                **common,
                **TILE_OPTIONS,
            )
    decode_kernel[(scratch.decode_programs,)](
        q_TNH,
        k_cache,
        v_cache,
        batch.block_table,
        batch.items,
        batch.counts[NUM_ITEMS:],
        scratch.tickets[0],
        out,
        scratch.part_out,
        scratch.part_lse,
        scratch.arrivals,
        scale_log2,
        table_stride,
        **common,
        **(DECODE_OPTIONS_FP8 if k_cache.dtype == torch.float8_e4m3fn else DECODE_OPTIONS),
    )
    if batch.is_mixed and scratch.side_stream is not None:
        torch.cuda.current_stream().wait_stream(scratch.side_stream)
    return out


@contextmanager
def _beside(stream: Any) -> Iterator[None]:
    """Run what is launched here beside what the current stream runs next; the caller joins them."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


def _row_scales(x_TD: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], 1, dtype=torch.float32)


def _num_warps(width: int) -> int:
    return min(16, max(1, width // 1024))
