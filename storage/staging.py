"""Stage a model: from wherever it is to this machine's fastest disk that it fits, verified, once.

    with stage_model("s3://bucket/models/qwen3-8b/", config=config) as staged:
        load(staged.path)

Many processes may call this at once: one moves the bytes, the others share them, and are told of each
file as it is verified. A model is whole when its MANIFEST.json is there, which is written last; nothing else is ever returned.
"""

import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from storage.destinations import EngineMemory
from storage.model_fill import FillOptions
from storage.object_store import StorageConfig
from storage.one_staging import StagedModel, Staging
from storage.s3_client import RetryPolicy

__all__ = ["PROCESS_BYTES", "StagedModel", "find_model", "process_memory", "stage_model"]

logger = logging.getLogger(__name__)

PROCESS_BYTES = 4 << 30
"""Of host memory, for an engine's process and its rows."""


def stage_model(
    source: str,
    *,
    config: StorageConfig,
    stage_to: str = "auto",
    engine_memory: Callable[[int], EngineMemory] | None = None,
    budget_bytes: int | None = None,
    allowed_code: Collection[str] = (),
    convert_gguf: Callable[[Path, Path], object] | None = None,
    gguf_dtype: str = "",
    num_threads: int | None = None,
    retry: RetryPolicy | None = None,
    on_ready: Callable[[Path], None] | None = None,
    on_file: Callable[[Path], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> StagedModel:
    """Return the model on a local disk, staging it if it is not there yet.

    Args:
        source: `s3://bucket/prefix/`, `hf://org/repo@revision`, a folder, or one .gguf file (local
            or on S3).
        stage_to: auto (the fastest disk it fits; a folder that fits none is read in place), shm (memory only), nvme (local disks only), none
            (read in place), or a folder.
        engine_memory: bytes of the weights -> host memory that the engine will need beside them if
            they are in /dev/shm; default: of its process and rows alone.
        budget_bytes: most bytes that staged models may take in the chosen cache.
        allowed_code: SHA-256 of config files that may name Python classes (`auto_map`).
        convert_gguf: makes a model folder (second argument, to be created) from a GGUF file (first).
        gguf_dtype: what `convert_gguf` makes of the weights; each dtype is a model of its own.
        num_threads: readers of ranges; default: one a core, at least 8 and at most 32.
        on_ready: told the model's folder once its small files are there and checked and room for
            the weights is reserved; not called when nothing is copied.
        on_file: told of each file as soon as it is verified, small files first, so that loading can
            begin before the model is whole; called by several threads.
        on_progress: told (bytes done, bytes in all).

    Raises:
        NotFound, AccessDenied, StoreUnavailable: as the source answered.
        BadInput: the model needs what is not staged: pickles, Python, missing weight files.
        CorruptObject: bytes are not what was promised; nothing was published.
        InputChanged: the source was replaced meanwhile; nothing was published.
        NoSpace: no disk has room for it, and it cannot be read in place or was not to be.
    """
    staging = Staging(
        stage_to=stage_to,
        engine_memory=engine_memory or process_memory,
        budget_bytes=budget_bytes,
        options=FillOptions(
            allowed_code=frozenset(allowed_code),
            convert_gguf=convert_gguf,
            gguf_dtype=gguf_dtype,
            num_threads=num_threads or _default_threads(),
            retry=retry or RetryPolicy(),
            on_ready=on_ready or (lambda folder: None),
            on_file=on_file or (lambda path: None),
            on_progress=on_progress or (lambda done, total: None),
        ),
    )
    staged = staging.run(source, config)
    assert staged is not None, "a model that is not near is staged"
    report = staged.report
    logger.info(
        "model %s: content_id=%s path=%s bytes_moved=%d elapsed_s=%.2f why: %s",
        *(report.outcome, report.content_id, report.path, report.bytes_moved, report.seconds),
        report.reason,
    )
    return staged


def find_model(
    source: str,
    *,
    config: StorageConfig,
    stage_to: str = "auto",
    allowed_code: Collection[str] = (),
    gguf_dtype: str = "",
) -> StagedModel | None:
    """Return the model if no byte must be moved for it: it is staged, or read in place; else None.

    Args and errors are those of `stage_model`.
    """
    options = FillOptions(allowed_code=frozenset(allowed_code), gguf_dtype=gguf_dtype)
    staging = Staging(
        stage_to=stage_to, engine_memory=process_memory, budget_bytes=None, options=options
    )
    return staging.run(source, config, only_near=True)


def process_memory(weight_bytes: int) -> EngineMemory:
    """What an engine needs whose weights are on a device."""
    return EngineMemory.sum_of({"the process and its rows": PROCESS_BYTES})


def _default_threads() -> int:
    return max(8, min(32, os.cpu_count() or 1))
