"""A mixture of experts on Triton kernels: the same function as `kernels.plain.experts`.

T tokens   E experts   K experts a token   D hidden size   I width of an expert
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from inference.kernels.experts import (
    count_kernel,
    down_kernel,
    gate_up_kernel,
    place_kernel,
    route_kernel,
    sum_kernel,
)
from inference.kernels.plain import ExpertWeights
from inference.kernels.shared_memory import architecture, shared_bytes


class Tiles(NamedTuple):
    """What one program of the products computes, for so many rows an expert."""

    block_m: int
    block_n: int
    block_k: int
    """Of 16-bit numbers: as many bytes of others."""

    num_warps: int
    num_stages: int


_TILES = (
    (8, Tiles(16, 128, 128, 4, 3)),
    (20, Tiles(32, 128, 128, 4, 3)),
    (64, Tiles(64, 128, 64, 4, 4)),
)
_LARGEST_TILES = Tiles(128, 256, 64, 8, 4)
_SCAN = 1024


def experts(
    x_TD: Tensor,
    logits_TE: Tensor,
    top_k: int,
    is_normed: bool,
    gate_up: ExpertWeights,
    down: ExpertWeights,
) -> Tensor:
    """Route each token to its experts and return the weighted sum of what they make of it, [T,D]."""
    from inference.kernels.fused import quantise_rows

    num_tokens, hidden = x_TD.shape
    num_experts, double, _ = gate_up.weight.shape
    width, num_rows = double // 2, num_tokens * top_k
    expert = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int32)
    share = logits_TE.new_empty(num_tokens, top_k)
    pad = triton.next_power_of_2(num_experts)
    route_kernel[(num_tokens,)](
        logits_TE,
        expert,
        share,
        E=num_experts,
        E_PAD=pad,
        TOP_K=top_k,
        K_PAD=triton.next_power_of_2(top_k),
        IS_NORMED=is_normed,
        num_warps=1,
    )
    tiles = tiles_for(num_rows / num_experts)
    max_blocks = min(num_rows, num_rows // tiles.block_m + num_experts)
    count = expert.new_empty(num_experts)
    rows = expert.new_empty(max_blocks * tiles.block_m)
    block_expert = expert.new_empty(max_blocks)
    num_blocks = expert.new_empty(1)
    count_kernel[(num_experts,)](expert, count, num_rows, BLOCK=_SCAN, num_warps=4)
    place_kernel[(num_experts,)](
        expert,
        count,
        rows,
        block_expert,
        num_blocks,
        num_rows,
        E=num_experts,
        E_PAD=pad,
        BM=tiles.block_m,
        BLOCK=_SCAN,
        num_warps=4,
    )
    is_fp8 = gate_up.scale is not None
    x, x_scale = quantise_rows(x_TD) if is_fp8 else (x_TD, x_TD)
    inner = x_TD.new_empty(max_blocks * tiles.block_m, width)
    block_n, options = _options(tiles, tiles.block_n // 2, 2, width, hidden, gate_up.weight.dtype)
    gate_up_kernel[(max_blocks * triton.cdiv(width, block_n),)](
        x,
        x_scale,
        gate_up.weight,
        gate_up.scale if is_fp8 else x_TD,
        rows,
        block_expert,
        num_blocks,
        inner,
        num_rows,
        TOP_K=top_k,
        D=hidden,
        WIDTH=width,
        **options,
    )
    inner, inner_scale = quantise_rows(inner) if is_fp8 else (inner, inner)
    parts = x_TD.new_empty(num_rows, hidden)
    block_n, options = _options(tiles, tiles.block_n, 1, hidden, width, down.weight.dtype)
    down_kernel[(max_blocks * triton.cdiv(hidden, block_n),)](
        inner,
        inner_scale,
        down.weight,
        down.scale if is_fp8 else x_TD,
        rows,
        block_expert,
        num_blocks,
        share,
        parts,
        num_rows,
        D=hidden,
        WIDTH=width,
        **options,
    )
    out = torch.empty_like(x_TD)
    block = min(1024, triton.next_power_of_2(hidden))
    grid = (num_tokens, triton.cdiv(hidden, block))
    sum_kernel[grid](parts, out, D=hidden, TOP_K=top_k, BLOCK=block, num_warps=4)
    return out


def tiles_for(rows_per_expert: float) -> Tiles:
    """Return the tiles for products whose experts have so many rows on average."""
    for most, tiles in _TILES:
        if rows_per_expert <= most:
            return tiles
    return _LARGEST_TILES


def _options(
    tiles: Tiles, block_n: int, num_products: int, outputs: int, inputs: int, dtype: torch.dtype
) -> tuple[int, dict[str, int | bool]]:
    """Return BN and the other constants of a kernel that makes so many products of BN outputs.

    No tile is much larger than what it cuts, and the buffers of all stages fit a program's shared memory.
    """
    is_fp8 = dtype == torch.float8_e4m3fn
    block_n = min(block_n, max(16, triton.next_power_of_2(outputs)))
    least, most = (32 if is_fp8 else 16), 2 * tiles.block_k // dtype.itemsize
    block_k = min(most, max(least, triton.next_power_of_2(inputs)))
    stage_bytes = (tiles.block_m + num_products * block_n) * block_k * dtype.itemsize
    return block_n, {
        "BM": tiles.block_m,
        "BN": block_n,
        "BK": block_k,
        "STAGES": min(tiles.num_stages, most_stages(stage_bytes, architecture())),
        "IS_FP8": is_fp8,
        "num_warps": tiles.num_warps,
    }


def most_stages(stage_bytes: int, arch: int | str) -> int:
    """Return how many stages fit a program's shared memory; before Hopper, of N stages N - 1 are held at a time."""
    is_early = isinstance(arch, int) and arch < 90
    return max(1, shared_bytes(arch) // stage_bytes + is_early)
