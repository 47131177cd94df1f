"""The engine of a run, built from weights that may still be on their way."""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

from inference.backends import create_backend
from inference.backends.base import BackendInfo
from inference.config import EngineConfig
from inference.openai_batch import SAMPLING_FIELDS
from inference.sampling_needs import SamplingNeeds
from tasks.ranks import distributed_of, num_ranks
from tasks.run import Run

log = logging.getLogger("nightjar.engine")


def build_engine(run: Run, build_backend: Callable[..., Any] = create_backend) -> Any:
    """Build the engine of a run, from weights that may still be on their way.

    Raises:
        ModelError: the weights are not those that the run was planned with.
        StorageError: they could not be staged.
    """
    backend = _build(run, build_backend)
    log.info("%s", describe_memory(backend.info))
    return backend


def describe_memory(info: BackendInfo) -> str:
    """Say what an engine reserves on each device."""
    if not info.memory:
        return f"engine on {info.device}: memory is not planned"
    parts = ", ".join(f"{name} {count / 1e9:.2f} GB" for name, count in info.memory.items())
    return f"engine on {info.device}, reserved on each device: {parts}"


def _build(run: Run, build_backend: Callable[..., Any]) -> Any:
    files = run.model.files()
    if files is None:
        return build_backend(engine_config(run))
    waited_before_s = files.waited_s
    config = dataclasses.replace(engine_config(run), model=str(files.folder()))
    # Where staging has only begun here, this was its beginning.
    before_s = run.model.stage_s + files.waited_s - waited_before_s
    began, began_waited_s = time.monotonic(), files.waited_s
    backend = build_backend(config, arriving=files)
    waited_s = files.waited_s - began_waited_s
    run.model.waited_s = files.waited_s - waited_before_s
    try:
        run.model.wait()
    except BaseException:
        backend.close()
        raise
    from tasks.stage import describe_cold_start  # boto3, which by now is imported

    ready_s = time.monotonic() - began
    log.info(
        "%s",
        describe_cold_start(
            run.model.staged.report, before_s=before_s, ready_s=ready_s, waited_s=waited_s
        ),
    )
    return backend


def engine_config(run: Run) -> EngineConfig:
    """Return what this run's replicas are built from."""
    knobs = run.job.engine
    return EngineConfig(
        model=str(run.model.path),
        backend=run.backend,
        dtype=run.job.model.dtype,
        allowed_code=tuple(run.job.model.allowed_code),
        quantization=run.job.model.quantization,
        max_num_seqs=knobs.max_num_seqs,
        max_num_batched_tokens=knobs.max_num_batched_tokens,
        max_model_len=run.max_model_len,
        kv_cache_dtype=knobs.kv_cache_dtype,
        tensor_parallel_size=num_ranks(run),
        distributed=distributed_of(run.job),
        enforce_eager=knobs.enforce_eager,
        offload=knobs.offload,
        nvme_path=knobs.nvme_path,
        sampling_needs=sampling_needs(run),
        seed=run.job.sampling.seed,
    )


def sampling_needs(run: Run) -> SamplingNeeds:
    """Return what the rows of a run may ask of the sampler, by the job and by the columns that override it."""
    columns = run.plan.prompt_columns
    by_row = SAMPLING_FIELDS if columns["kind"] == "openai" else columns["sampling"]
    return SamplingNeeds.of(run.job.sampling.params(), by_row)
