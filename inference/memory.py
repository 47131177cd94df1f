"""MemoryPlan: how many KV blocks fit, from what the device has and what a step was measured to need."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from inference.errors import EngineConfigError
from inference.kv_cache import KVCache, KVShape

logger = logging.getLogger(__name__)

MIB = 2**20
GRAPH_BYTES = 256 * MIB
GRAPH_LAYER_BYTES = 16 * MIB
GRAPH_LAYER_BYTES_OF_RANKS = 48 * MIB
EXPERT_LAYER_BYTES = 16 * MIB
CLASS_EXPERT_LAYER_BYTES = 64 * MIB
"""Kept for library workspaces and fragmentation, and for a layer's nodes in all captured graphs: measured 33 to
42 MB a layer with collectives among them (66 graphs, NCCL 2.28), 20 MB without. Experts: 49 graphs of 48 fused layers took
1.0 GB, steps included; a model class that is run unmodified has five times as many launches."""

CPU_CACHE_BYTES = 512 * MIB
LEAST_BLOCKS = 8
"""A smaller cache is of no use."""


class NoRoom(EngineConfigError):
    """Weights and a step leave the KV cache no room."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device is full, by torch's own allocator or as NCCL, cuBLAS and Triton's loader say it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in str(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error))
    )


def first_line(error: BaseException) -> str:
    """Return what fits a log line of an error of torch, which may go on with pages of advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by purpose."""

    weights: int
    step: int
    """Measured: the most that the largest step allocates beyond weights and cache, twice (launched, captured)."""

    graphs: int
    tally: int
    """Kept for rows with penalties, see `inference.tally`."""

    spare: int = 0
    """Left alone, after ranks ran out of memory."""

    kv_cache: int
    num_blocks: int

    def as_dict(self) -> dict[str, int]:
        """Return the bytes by purpose."""
        return {
            "weights": self.weights,
            "step": self.step,
            "graphs": self.graphs,
            "tally": self.tally,
            "spare": self.spare,
            "kv_cache": self.kv_cache,
        }


def measure_step(run: Callable[[], None], device: torch.device) -> int:
    """Return the bytes that `run` allocates at its peak."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def allowed_device_bytes(device: torch.device) -> int:
    """Return what this process may ever allocate there: the device's memory, or its share if it has one."""
    _, total = torch.cuda.mem_get_info(device)
    share_of = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not in older torch
    return int(share_of(device) * total) if share_of else total


def free_device_bytes(device: torch.device) -> int:
    """Return what this process may still allocate there."""
    free, _ = torch.cuda.mem_get_info(device)
    return min(free, allowed_device_bytes(device) - torch.cuda.memory_reserved(device))


def plan_cuda(
    shape: KVShape,
    *,
    step_bytes: int,
    max_blocks: int,
    device: torch.device,
    has_peers: bool,
    expert_layer_bytes: int,
    tally_bytes: int = 0,
    spare_bytes: int = 0,
) -> MemoryPlan:
    """Give the cache all that weights, steps, graphs and tally leave of the device.

    `expert_layer_bytes` are kept for a layer's graphs beside those of a dense one.

    Raises:
        NoRoom: not even a few blocks fit.
    """
    torch.cuda.empty_cache()
    free = free_device_bytes(device)
    weights = torch.cuda.memory_allocated(device)
    layer_bytes = GRAPH_LAYER_BYTES_OF_RANKS if has_peers else GRAPH_LAYER_BYTES
    graphs = GRAPH_BYTES + shape.num_layers * (layer_bytes + expert_layer_bytes)
    left = free - 2 * step_bytes - graphs - tally_bytes - spare_bytes
    num_blocks = min(max_blocks, left // shape.block_bytes)
    if num_blocks < LEAST_BLOCKS:
        raise NoRoom(
            f"no room for a KV cache: weights {weights / 1e9:.1f} GB, a step {step_bytes / 1e9:.1f} GB "
            f"twice, {free / 1e9:.1f} GB free; lower engine.max_num_batched_tokens, use "
            f"model.quantization fp8 or a larger device"
        )
    return MemoryPlan(
        weights=weights,
        step=2 * step_bytes,
        graphs=graphs,
        tally=tally_bytes,
        spare=spare_bytes,
        kv_cache=num_blocks * shape.block_bytes,
        num_blocks=num_blocks,
    )


def plan_cpu(shape: KVShape, *, weights: int, min_blocks: int, max_blocks: int) -> MemoryPlan:
    """Give the cache what all sequences can use, up to half a gigabyte, but room for one at least."""
    num_blocks = max(min_blocks, min(max_blocks, CPU_CACHE_BYTES // shape.block_bytes))
    return MemoryPlan(
        weights=weights,
        step=0,
        graphs=0,
        tally=0,
        kv_cache=num_blocks * shape.block_bytes,
        num_blocks=num_blocks,
    )


def allocate(shape: KVShape, num_blocks: int, device: torch.device) -> KVCache:
    """Allocate the cache, a twentieth smaller each time it does not fit after all."""
    while True:
        try:
            return KVCache(shape, num_blocks, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            smaller = num_blocks * 19 // 20
            if smaller < LEAST_BLOCKS:
                raise
            logger.warning("a KV cache of %d blocks does not fit: trying %d", num_blocks, smaller)
            num_blocks = smaller
