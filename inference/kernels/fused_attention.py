"""Paged attention on Triton kernels: prefill and shared prefixes as tiles, decoding rows beside them.

T tokens   N query heads   K KV heads   H head dim   P attention parts
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
from inference.kernels.decode_attention import decode_kernel
from inference.kernels.shared_memory import IS_COMPILED, architecture, shared_bytes
from inference.kernels.tile_attention import tile_kernel

TILE_ROWS = 64
"""Least rows of a prefill or cascade tile: query tokens times the query heads of one KV head."""

DECODE_OPTIONS = {"TILE": 32, "num_warps": 2, "STAGES": 5}
DECODE_OPTIONS_ONE_BUFFER = {**DECODE_OPTIONS, "STAGES": 2}
DECODE_OPTIONS_FP8 = {"TILE": 64, "num_warps": 2, "STAGES": 3}
DECODE_OPTIONS_PAIRED = {"TILE": 32, "num_warps": 1, "STAGES": 5}
"""Some stages go to the block table's entry, whose load an address waits for: 2 to 4 compile to one buffer of keys and
values, 5 to two. Values in pairs, see `attend`, take so few registers that twice as many programs find room."""

PAIRED_HEAD_DIM = 128
"""The one width at which e4m3 values in pairs are measured and checked on a card."""

TILE_PROGRAMS_PER_SM = 2
TILE_OPTIONS = {"TILE": 64, "num_warps": 4, "STAGES": 5}
"""Two buffers of keys and values, for 16-bit ones of at most 128 dims: e4m3 and wider heads are not measured so."""

TILE_OPTIONS_ONE_BUFFER = {"TILE": 64, "num_warps": 4, "STAGES": 2}
TILE_OPTIONS_SHORT = {"TILE": 32, "num_warps": 4, "STAGES": 2}
"""Where a program has less shared memory than the others need."""

HAS_PTX = IS_COMPILED and torch.version.hip is None
"""Kernels are compiled for NVIDIA's devices: neither interpreted nor for another's."""


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
    limits: BatchLimits,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> Scratch:
    """Allocate room for every part a batch within `limits` can have."""
    num_parts = (
        limits.max_num_items + limits.max_num_seqs + limits.tile_queries * limits.num_programs
    )
    return Scratch(
        torch.empty(num_parts, num_heads, head_dim, dtype=torch.float32, device=device),
        torch.empty(num_parts, num_heads, dtype=torch.float32, device=device),
        torch.zeros(2, 32, dtype=torch.int32, device=device),
        torch.zeros(limits.max_num_seqs, num_kv_heads, dtype=torch.int32, device=device),
        decode_programs=decode_programs(device, kv_dtype, head_dim),
        tile_programs=num_multiprocessors(device) * TILE_PROGRAMS_PER_SM,
        side_stream=_priority_stream(device),
    )


def decode_programs(device: torch.device, kv_dtype: torch.dtype, head_dim: int) -> int:
    """Return how many programs decode attention runs as."""
    return num_multiprocessors(device) * (8 if _is_paired(kv_dtype, head_dim) else 4)


def _is_paired(kv_dtype: torch.dtype, head_dim: int) -> bool:
    return kv_dtype == torch.float8_e4m3fn and head_dim == PAIRED_HEAD_DIM


def _priority_stream(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    cuda: Any = torch.cuda
    return cuda.Stream(device, priority=-1)


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
        "WINDOW": window,
        "HAS_PTX": HAS_PTX,
    }
    if batch.is_mixed:
        options = tile_options(k_cache.element_size(), h_pad, tile_rows(group), architecture())
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
                **_within(block_size, options),
            )
    options = decode_options(k_cache.element_size(), h_pad, common["G_PAD"], architecture())
    if _is_paired(k_cache.dtype, head_dim):
        options, v_cache = DECODE_OPTIONS_PAIRED, v_cache.view(torch.int16)
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
        **_within(block_size, options),
    )
    if batch.is_mixed and scratch.side_stream is not None:
        torch.cuda.current_stream().wait_stream(scratch.side_stream)
    return out


def tile_options(element_size: int, h_pad: int, num_rows: int, arch: int | str) -> dict[str, int]:
    """Return the tile kernel's options for keys of so many bytes and dims, and tiles of so many rows of queries."""
    if element_size == 2 and h_pad <= 128 and _fits(64, 2, element_size, h_pad, num_rows, arch):
        return TILE_OPTIONS
    if _fits(64, 1, element_size, h_pad, num_rows, arch):
        return TILE_OPTIONS_ONE_BUFFER
    return TILE_OPTIONS_SHORT


def decode_options(element_size: int, h_pad: int, num_rows: int, arch: int | str) -> dict[str, int]:
    """Return the decode kernel's options, as `tile_options` does, but for e4m3 values in pairs."""
    if element_size == 1:
        return DECODE_OPTIONS_FP8
    has_room = _fits(DECODE_OPTIONS["TILE"], 2, element_size, h_pad, num_rows, arch)
    return DECODE_OPTIONS if has_room else DECODE_OPTIONS_ONE_BUFFER


def _fits(
    num_keys: int, num_buffers: int, element_size: int, h_pad: int, num_rows: int, arch: int | str
) -> bool:
    """Whether queries, buffers of keys and values, and weights of them are within a program's shared memory."""
    of_queries = max(2, element_size) * num_rows * (h_pad + num_keys)
    of_buffers = element_size * 2 * num_keys * num_buffers * h_pad
    return of_queries + of_buffers + 1024 <= shared_bytes(arch)


def _within(block_size: int, options: dict[str, int]) -> dict[str, int]:
    """Return options whose tile of keys lies within one block."""
    return {**options, "TILE": min(options["TILE"], block_size)}


@contextmanager
def _beside(stream: Any) -> Iterator[None]:
    """Run what is launched here beside what the current stream runs next; the caller joins them."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
