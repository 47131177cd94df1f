"""Building a paged engine around a model: the KV cache of its memory plan, the scheduler, the graphs.

A device that is full meanwhile has it built again smaller (see `inference.engine_sizes`).
"""

import functools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace

from inference.backends.row import Row
from inference.block_manager import BlockManager
from inference.engine import PagedEngine
from inference.engine_sizes import (
    EngineSizes,
    batch_limits,
    full_among_peers,
    let_go,
    make_scratch,
    plan_sizes,
    smaller_build,
    trial_runner,
)
from inference.errors import EngineConfigError
from inference.graphs import around, sizes
from inference.memory import MemoryPlan, allocate, first_line, is_out_of_memory
from inference.model import PagedModel
from inference.model_runner import ModelRunner
from inference.paged_settings import PagedSettings
from inference.scheduler import Scheduler
from inference.sequence import Sequence
from inference.steps import Running

logger = logging.getLogger(__name__)


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
    model.ranks.open_peer_sum(
        most_tokens * model.hidden_size,
        model.dtype,
        model.device,
        is_replayed=settings.use_graphs,
    )
    while True:
        sizes_found = plan_sizes(model, settings)
        settings, plan = sizes_found.settings, sizes_found.plan
        built = _try_to_build(model, sizes_found, make_row)
        if built is not None:
            return *built, time.perf_counter() - started_at
        settings = smaller_build(settings, plan)
        del sizes_found
        let_go(model)


def _try_to_build(
    model: PagedModel, found: EngineSizes, make_row: Callable[[Sequence], Row]
) -> tuple[PagedEngine, MemoryPlan] | None:
    """Build and warm up; None: the device is full."""
    try:
        return _build(model, found, make_row)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if model.ranks.size > 1:
            raise full_among_peers(found.settings, error) from error
        logger.warning("out of memory in warm-up: %s", first_line(error))
    return None


def _build(
    model: PagedModel, found: EngineSizes, make_row: Callable[[Sequence], Row]
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


def run_all(model: PagedModel, settings: PagedSettings) -> None:
    """Launch every kernel that `build_engine` launches, in the same shapes; for a model on the meta device."""
    limits = batch_limits(model, settings)
    runner = trial_runner(model, settings, limits, make_scratch(model, settings, limits))
    runner.run_largest()
    if settings.use_graphs:
        runner.run_sizes(_captured_sizes(settings), row_sizes=sizes(settings.max_num_seqs))


def _captured_sizes(settings: PagedSettings) -> list[int]:
    """Return the token counts whose graphs are captured at the start; larger ones are when work comes that needs them."""
    return sizes(min(2048, settings.max_num_batched_tokens))


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
