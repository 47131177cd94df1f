"""How large a paged engine is made: a memory plan from a measured step, and smaller ones where that is too much.

The largest step is run once to see what it allocates; the cache gets what memory is left. Where the device is full
meanwhile, or too little is left, steps become smaller, then the cache.
"""

import gc
import logging
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from inference import memory
from inference.batch import BatchLimits
from inference.errors import OutOfMemory
from inference.kv_cache import KVCache
from inference.memory import (
    LEAST_BLOCKS,
    MemoryPlan,
    NoRoom,
    first_line,
    is_out_of_memory,
    measure_step,
    plan_cpu,
    plan_cuda,
)
from inference.model import FusedModel, PagedModel
from inference.model_runner import ModelRunner
from inference.paged_settings import PagedSettings, expert_share
from inference.steps import Running

logger = logging.getLogger(__name__)

DEAR_STEP_SHARE = 1 / 8
"""Of the KV cache: what larger steps may cost it."""


class EngineSizes(NamedTuple):
    """What an engine is built by."""

    settings: PagedSettings
    limits: BatchLimits
    scratch: Any
    plan: MemoryPlan


def plan_sizes(model: PagedModel, settings: PagedSettings) -> EngineSizes:
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
        let_go(model)
        settings = smaller


def smaller_build(settings: PagedSettings, plan: MemoryPlan) -> PagedSettings:
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


def full_among_peers(settings: PagedSettings, error: Exception) -> OutOfMemory:
    """The error of a rank whose peers wait for it: all have to start again."""
    return OutOfMemory(
        f"out of memory before the first step, of at most {settings.max_num_batched_tokens} tokens: "
        f"{first_line(error)}; lower engine.max_num_batched_tokens or engine.max_num_seqs, or use more ranks"
    )


def let_go(model: PagedModel) -> None:
    """Free what an attempt has left on the device; nothing may refer to it."""
    model.detach()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def batch_limits(model: PagedModel, settings: PagedSettings) -> BatchLimits:
    """What the largest step may hold."""
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


def make_scratch(model: PagedModel, settings: PagedSettings, limits: BatchLimits) -> Any:
    """Return the memory that attention works in, shared by all layers; for models that use our kernels."""
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


def trial_runner(
    model: PagedModel, settings: PagedSettings, limits: BatchLimits, scratch: Any
) -> ModelRunner:
    """Return a runner over a cache of two blocks, without graphs."""
    shape = model.kv_shape(settings.block_size, settings.kv_dtype)
    model.attach(KVCache(shape, 2, model.device), settings.max_model_len)

    def row_of(running: Running) -> Any:
        raise AssertionError(f"no sequence runs while sizes are tried, but {running} does")

    return ModelRunner(model, limits, row_of=row_of, scratch=scratch, use_graphs=False)


def _try_to_plan(model: PagedModel, settings: PagedSettings) -> EngineSizes | None:
    """Plan the memory by a measured step; None: there is no room, and smaller steps may be tried."""
    has_peers = model.ranks.size > 1
    # Ranks go on together only where all of them expect to be asked.
    can_shrink = settings.fewer_batched_tokens is not None or (
        not has_peers and settings.smaller_steps() is not None
    )
    try:
        limits = batch_limits(model, settings)
        scratch = make_scratch(model, settings, limits) if model.uses_kernels else None
        return EngineSizes(
            settings, limits, scratch, _plan_memory(model, settings, limits, scratch)
        )
    except NoRoom:
        if not can_shrink:
            raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if not can_shrink and has_peers:
            raise full_among_peers(settings, error) from error
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
    trial = trial_runner(model, settings, limits, scratch)
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


def _tell_smaller_steps(settings: PagedSettings, smaller: PagedSettings) -> None:
    logger.warning(
        "going on with at most %d tokens a step instead of %d, of %d sequences instead of %d",
        smaller.max_num_batched_tokens,
        settings.max_num_batched_tokens,
        smaller.max_num_seqs,
        settings.max_num_seqs,
    )


def _expert_layer_bytes(model: PagedModel) -> int:
    if expert_share(model) == 1:
        return 0
    return (
        memory.EXPERT_LAYER_BYTES
        if isinstance(model, FusedModel)
        else memory.CLASS_EXPERT_LAYER_BYTES
    )
