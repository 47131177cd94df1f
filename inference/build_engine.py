"""Building a paged engine around a model: a measured memory plan, the KV cache, the graphs.

The largest step is run once to see what it allocates; the cache gets what memory is left; then the graphs are
captured. Each part is timed and reported.
"""

import functools
import gc
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from inference import memory
from inference.backends.row import Row
from inference.batch import BatchLimits
from inference.block_manager import BlockManager
from inference.engine import PagedEngine
from inference.errors import EngineConfigError, OutOfMemory
from inference.graphs import around, sizes
from inference.kv_cache import KVCache
from inference.memory import (
    LEAST_BLOCKS,
    MemoryPlan,
    NoRoom,
    allocate,
    first_line,
    is_out_of_memory,
    measure_step,
    plan_cpu,
    plan_cuda,
)
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
    """Build an engine around a model; return it with its memory plan and the seconds warm-up took.

    A device that is full meanwhile has it built again with a smaller cache or smaller steps.

    Raises:
        EngineConfigError: the cache does not hold max_model_len, or the smallest steps leave no room for one.
        OutOfMemory: the device is full even so; or the ranks have to start again.
    """
    started_at = time.perf_counter()
    if model.device.type == "cuda":
        _prefer_products_without_workspace()
    most_tokens = settings.max_num_batched_tokens
    model.ranks.open_peer_sum(most_tokens * model.hidden_size, model.dtype, model.device)
    while True:
        sizes_found = _plan_sizes(model, settings)
        settings, plan = sizes_found.settings, sizes_found.plan
        built = _try_to_build(model, sizes_found, make_row)
        if built is not None:
            return *built, time.perf_counter() - started_at
        settings = _smaller(settings, plan)
        del sizes_found
        _let_go(model)


class _Sizes(NamedTuple):
    """What an engine is built by."""

    settings: PagedSettings
    limits: BatchLimits
    scratch: Any
    plan: MemoryPlan


def _try_to_build(
    model: PagedModel, found: _Sizes, make_row: Callable[[Sequence], Row]
) -> tuple[PagedEngine, MemoryPlan] | None:
    """Build and warm up; None: the device is full."""
    try:
        return _build(model, found, make_row)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if model.ranks.size > 1:
            raise _full_among_peers(found.settings, error) from error
        logger.warning("out of memory in warm-up: %s", first_line(error))
    return None


def _build(
    model: PagedModel, found: _Sizes, make_row: Callable[[Sequence], Row]
) -> tuple[PagedEngine, MemoryPlan]:
    settings, limits, scratch, plan = found
    is_cuda = model.device.type == "cuda"
    shape = model.kv_shape(settings.block_size, settings.kv_dtype)
    cache = allocate(shape, plan.num_blocks, model.device)
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
    engine.runner.warm_up(
        _captured_sizes(settings), row_sizes=sizes(settings.max_num_seqs), needs=settings.needs
    )
    return engine, replace(plan, num_blocks=cache.num_blocks, kv_cache=cache.num_bytes)


def _smaller(settings: PagedSettings, plan: MemoryPlan) -> PagedSettings:
    """Return what to build instead of an engine whose warm-up filled the device, and say so.

    Raises:
        OutOfMemory: nothing is left to be made smaller; with the numbers.
    """
    per_row = -(-settings.max_model_len // settings.block_size) + 1
    fewer = plan.num_blocks * 7 // 8
    steps = settings.smaller_steps()
    if fewer < per_row and steps is not None:
        _tell_smaller_steps(settings, steps)
        return replace(steps, max_num_blocks=plan.num_blocks)
    if fewer < (LEAST_BLOCKS if settings.may_shorten else per_row):
        raise OutOfMemory(
            f"out of memory before the first step: weights {plan.weights / 1e9:.1f} GB, a KV cache of "
            f"{plan.num_blocks} blocks {plan.kv_cache / 1e9:.1f} GB, steps of {settings.max_num_batched_tokens} "
            f"tokens; lower engine.max_model_len, {settings.max_model_len}, or use a larger device"
        )
    logger.warning("going on with a KV cache of %d blocks instead of %d", fewer, plan.num_blocks)
    return replace(settings, max_num_blocks=fewer)


def _tell_smaller_steps(settings: PagedSettings, smaller: PagedSettings) -> None:
    logger.warning(
        "going on with at most %d tokens a step instead of %d, of %d sequences instead of %d",
        smaller.max_num_batched_tokens,
        settings.max_num_batched_tokens,
        smaller.max_num_seqs,
        settings.max_num_seqs,
    )


def _full_among_peers(settings: PagedSettings, error: Exception) -> OutOfMemory:
    """The error of a rank whose peers wait for it: all have to start again."""
    return OutOfMemory(
        f"out of memory before the first step, of at most {settings.max_num_batched_tokens} tokens: "
        f"{first_line(error)}; lower engine.max_num_batched_tokens or engine.max_num_seqs, or use more ranks"
    )


def _let_go(model: PagedModel) -> None:
    """Free what an attempt has left on the device; nothing may refer to it."""
    model.detach()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    """Return the token counts whose graphs are captured at the start; larger ones are when work comes that needs them."""
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


def _plan_sizes(model: PagedModel, settings: PagedSettings) -> _Sizes:
    """Plan the memory, with smaller steps where larger ones do not fit, or would take it from few keys and values."""
    while True:
        found, smaller = _try_to_plan(model, settings), settings.smaller_steps()
        is_good = found is not None
        if (fewer := settings.fewer_batched_tokens) is not None:
            spared = 1 - fewer / settings.max_num_batched_tokens
            if found is not None:
                is_good = found.plan.step * spared <= found.plan.kv_cache * DEAR_STEP_SHARE
            is_good = bool(model.ranks.agree_on_least(int(is_good)))  # all ranks take steps alike
        if found is not None and is_good:
            return found
        assert smaller is not None, "who cannot be smaller is refused by `_try_to_plan`"
        if found is None:
            _tell_smaller_steps(settings, smaller)
        del found
        _let_go(model)
        settings = smaller


def _try_to_plan(model: PagedModel, settings: PagedSettings) -> _Sizes | None:
    """Plan the memory by a measured step; None: there is no room, and smaller steps may be tried."""
    has_peers = model.ranks.size > 1
    # Ranks go on together only where all of them expect to be asked.
    can_shrink = settings.fewer_batched_tokens is not None or (
        not has_peers and settings.smaller_steps() is not None
    )
    try:
        limits = _limits(model, settings)
        scratch = _scratch(model, settings, limits) if model.uses_kernels else None
        return _Sizes(settings, limits, scratch, _plan_memory(model, settings, limits, scratch))
    except NoRoom:
        if not can_shrink:
            raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if not can_shrink and has_peers:
            raise _full_among_peers(settings, error) from error
        if not can_shrink:
            raise OutOfMemory(
                f"out of memory in a step of one token, beside {model.num_weight_bytes / 1e9:.1f} GB of "
                f"weights; lower engine.max_model_len, {settings.max_model_len}, or use a larger device"
            ) from error
        logger.warning("out of memory while the largest step is measured: %s", first_line(error))
    return None


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
