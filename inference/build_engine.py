"""Building a paged engine around a model: a measured memory plan, the KV cache, the graphs.

The largest step is run once to see what it allocates; the cache gets what memory is left; then the graphs are
captured. Each part is timed and reported.
"""

import functools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from inference import memory
from inference.backends.row import Row
from inference.batch import BatchLimits
from inference.block_manager import BlockManager
from inference.engine import PagedEngine
from inference.errors import EngineConfigError
from inference.graphs import around, sizes
from inference.kv_cache import KVCache
from inference.memory import MemoryPlan, allocate, measure_step, plan_cpu, plan_cuda
from inference.model import FusedModel, PagedModel
from inference.model_runner import ModelRunner
from inference.paged_settings import PagedSettings, expert_share
from inference.scheduler import Scheduler
from inference.sequence import Sequence
from inference.steps import Running

logger = logging.getLogger(__name__)

DEAR_STEP_SHARE = 1 / 8
"""Of the KV cache: what larger steps may cost it."""


def build_engine(
    model: PagedModel, settings: PagedSettings, make_row: Callable[[Sequence], Row]
) -> tuple[PagedEngine, MemoryPlan, float]:
    """Build an engine around a model; return it with its memory plan and the seconds warm-up took."""
    started_at = time.perf_counter()
    is_cuda = model.device.type == "cuda"
    if is_cuda:
        _prefer_products_without_workspace()
    most_tokens = settings.max_num_batched_tokens
    model.ranks.open_peer_sum(most_tokens * model.hidden_size, model.dtype, model.device)
    settings, limits, scratch, plan = _plan_sizes(model, settings)
    cache = allocate(
        model.kv_shape(settings.block_size, settings.kv_dtype), plan.num_blocks, model.device
    )
    # Ranks may have different room; they make the same decisions only with the same number of blocks.
    num_blocks = model.ranks.agree_on_least(cache.num_blocks)
    max_model_len = _max_len_in(num_blocks, settings)
    model.attach(cache, max_model_len)
    blocks = BlockManager(num_blocks=num_blocks, block_size=settings.block_size)

    def make_scheduler(completion_of: Callable[[Running], list[int]]) -> Scheduler:
        return Scheduler(
            blocks,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=max_model_len,
            min_step_tokens=settings.min_step_tokens,
            completion_of=completion_of,
            sizes_around=functools.partial(around, limit=limits.max_num_tokens)
            if is_cuda
            else None,
        )

    engine = PagedEngine(
        make_row=make_row,
        make_scheduler=make_scheduler,
        make_runner=lambda row_of: ModelRunner(
            model, limits, row_of=row_of, scratch=scratch, use_graphs=settings.use_graphs
        ),
        is_async=is_cuda or model.uses_kernels,
    )
    engine.runner.warm_up(_captured_sizes(settings), row_sizes=sizes(settings.max_num_seqs))
    return engine, plan, time.perf_counter() - started_at


def run_all(model: PagedModel, settings: PagedSettings) -> None:
    """Launch every kernel that `build_engine` launches, in the same shapes; for a model on the meta device."""
    limits = _limits(model, settings)
    runner = _trial_runner(model, settings, limits, _scratch(model, settings, limits))
    runner.run_largest()
    if settings.use_graphs:
        runner.run_sizes(_captured_sizes(settings), row_sizes=sizes(settings.max_num_seqs))


def _trial_runner(
    model: PagedModel, settings: PagedSettings, limits: BatchLimits, scratch: Any
) -> ModelRunner:
    """Return a runner over a cache of two blocks, without graphs."""
    shape = model.kv_shape(settings.block_size, settings.kv_dtype)
    model.attach(KVCache(shape, 2, model.device), settings.max_model_len)

    def row_of(running: Running) -> Any:
        raise AssertionError(f"no sequence runs while sizes are tried, but {running} does")

    return ModelRunner(model, limits, row_of=row_of, scratch=scratch, use_graphs=False)


def _captured_sizes(settings: PagedSettings) -> list[int]:
    """Return the token counts whose graphs are captured at the start; larger ones are when they first occur."""
    return sizes(min(2048, settings.max_num_batched_tokens))


def _expert_layer_bytes(model: PagedModel) -> int:
    if expert_share(model) == 1:
        return 0
    return (
        memory.EXPERT_LAYER_BYTES
        if isinstance(model, FusedModel)
        else memory.CLASS_EXPERT_LAYER_BYTES
    )


def _max_len_in(num_blocks: int, settings: PagedSettings) -> int:
    """Return max_model_len, lowered to what the cache holds where that is allowed."""
    num_tokens = (num_blocks - 1) * settings.block_size
    if settings.max_model_len <= num_tokens:
        return settings.max_model_len
    if not settings.may_shorten:
        raise EngineConfigError(
            f"the KV cache holds {num_tokens} tokens, engine.max_model_len is "
            f"{settings.max_model_len}; lower it, or use a larger device"
        )
    logger.warning(
        "max_model_len is %d instead of the model's %d: more does not fit the KV cache",
        num_tokens,
        settings.max_model_len,
    )
    return num_tokens


def _prefer_products_without_workspace() -> None:
    """Keep cuBLAS from algorithms that clear a workspace first: in a graph that costs 10 us a product.

    Read by torch when it makes its first cuBLAS handle; what the user has set stays.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")


def _limits(model: PagedModel, settings: PagedSettings) -> BatchLimits:
    shape = model.kv_shape(settings.block_size)
    tile_queries, num_programs = settings.max_num_batched_tokens, 1
    if model.uses_kernels:
        from inference.kernels import fused_attention

        group = model.num_heads // shape.num_kv_heads
        tile_queries = fused_attention.tile_rows(group) // group
        num_decode_programs = fused_attention.decode_programs(
            model.device, settings.kv_dtype, shape.head_dim
        )
        num_programs = max(1, num_decode_programs // shape.num_kv_heads)
    return BatchLimits(
        max_num_tokens=settings.max_num_batched_tokens,
        max_num_seqs=settings.max_num_seqs,
        block_size=settings.block_size,
        max_blocks_per_seq=-(-settings.max_model_len // settings.block_size),
        tile_queries=tile_queries,
        num_programs=num_programs,
        max_num_items=max(256, 4 * settings.max_num_seqs),
    )


def _scratch(model: PagedModel, settings: PagedSettings, limits: BatchLimits) -> Any:
    from inference.kernels import fused_attention

    shape = model.kv_shape(limits.block_size)
    return fused_attention.make_scratch(
        limits,
        model.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        settings.kv_dtype,
        model.device,
    )


def _plan_sizes(
    model: PagedModel, settings: PagedSettings
) -> tuple[PagedSettings, BatchLimits, Any, MemoryPlan]:
    """Plan the memory, with smaller steps where larger ones would take it from few keys and values."""
    fewer = settings.fewer_batched_tokens
    limits = _limits(model, settings)
    scratch = _scratch(model, settings, limits) if model.uses_kernels else None
    plan: MemoryPlan | None = None
    try:
        plan = _plan_memory(model, settings, limits, scratch)
    except (EngineConfigError, torch.OutOfMemoryError):
        if fewer is None:
            raise
    if fewer is not None:
        spared = 1 - fewer / settings.max_num_batched_tokens
        is_dear = plan is None or plan.step * spared > plan.kv_cache * DEAR_STEP_SHARE
        if not model.ranks.agree_on_least(int(not is_dear)):  # all ranks take steps alike
            del scratch
            settings = replace(settings, max_num_batched_tokens=fewer, fewer_batched_tokens=None)
            return _plan_sizes(model, settings)
    assert plan is not None
    return settings, limits, scratch, plan


def _plan_memory(
    model: PagedModel, settings: PagedSettings, limits: BatchLimits, scratch: Any
) -> MemoryPlan:
    """Measure the largest step with a cache of a few blocks, then plan the real one."""
    shape = model.kv_shape(settings.block_size, settings.kv_dtype)
    most = settings.max_num_blocks or 2**30
    if model.device.type != "cuda":
        per_seq = -(-settings.max_model_len // settings.block_size)
        most = min(most, settings.max_num_seqs * per_seq + 1)
        least = 2 if settings.max_num_blocks else per_seq + 1
        return plan_cpu(shape, weights=model.num_weight_bytes, min_blocks=least, max_blocks=most)
    trial = _trial_runner(model, settings, limits, scratch)
    step_bytes, tally_bytes = measure_step(trial.run_largest, model.device), trial.tally_bytes
    del trial
    return plan_cuda(
        shape,
        step_bytes=step_bytes,
        max_blocks=most,
        device=model.device,
        has_peers=model.ranks.size > 1,
        expert_layer_bytes=_expert_layer_bytes(model),
        tally_bytes=tally_bytes,
        spare_bytes=settings.spare_bytes,
    )
