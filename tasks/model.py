"""From `model.source` to a checked local folder: at once, by a look, or while the engine loads.

open_model    the whole model, here                     whoever has no reason for less
peek_model    config, tokenizer and identity only       planning: no weights move
begin_model   as soon as config and tokenizer are here  a replica: weights arrive while they load
"""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.arriving import Arriving
from inference.backends import check_engine
from inference.backends.dummy_tokenizer import DUMMY_MODEL_DIR
from inference.config import EngineConfig
from inference.content_id import WeightSample, sample_spans
from inference.errors import EngineConfigError, ModelError
from inference.heads import check_heads
from inference.model_config import read_model_shape
from inference.weights import (
    SmallFiles,
    check_model_folder,
    check_sampled_folder,
    check_small_files,
)
from tasks.choose_tier import HERE, settle_backend
from tasks.job import RunConfig
from tasks.progress import Progress
from tasks.stage_thread import StageThread

log = logging.getLogger("nightjar.model")

_DUMMY_MAX_MODEL_LEN = 32_768


@dataclass(slots=True, kw_only=True)
class RunModel:
    """The model of a run; closing gives its staged copy free."""

    path: Path
    """Holds config and tokenizer; the weights too once nothing is on its way."""

    max_model_len: int
    uri: str = ""
    """Its source, a Hub revision pinned to its commit; empty while it is not known."""

    content_id: str | None = None
    """What it is known, or expected, to be; None while neither is said."""

    allowed_code: Collection[str] = ()
    """SHA-256 of config files that may name code; see `inference.weights`."""

    num_weight_bytes: int = 0
    stage_s: float = 0.0
    """Seconds that were spent waiting before the engine could begin to load."""

    waited_s: float = 0.0
    """Seconds that the engine, once it loaded, waited for files; taken by whoever accounts for them."""

    staged: Any = field(default=None, repr=False)
    start: Callable[[], StageThread] | None = field(default=None, repr=False)
    """Begins to stage a model that was only looked at."""

    staging: StageThread | None = field(default=None, repr=False)

    def files(self) -> Arriving | None:
        """The files for an engine to load, some still on their way; None when `path` is whole.

        Raises:
            StorageError: what staging ended with.
        """
        if self.staging is None and self.start is not None:
            self.staging = self.start()
        return None if self.staging is None else self.staging.files

    def expect(self, content_id: str) -> None:
        """Refuse any other model, now or when `wait` learns which one it is. Raises ModelError."""
        if self.content_id not in (None, content_id):
            raise ModelError(
                f"{self.path}: content {str(self.content_id)[:12]}, this run was planned with "
                f"{content_id[:12]}; restore the weights or start a new run"
            )
        self.content_id = content_id

    def wait(self) -> None:
        """Wait until the model is whole and use it from now on; it must be the one that is expected.

        Raises:
            ModelError: it is another one.
            StorageError: what staging ended with.
        """
        if self.staging is None:
            return
        self.staged = self.staging.result()
        self.staging = self.start = None
        folder = check_model_folder(self.staged.path, self.allowed_code)
        self.path, self.num_weight_bytes = folder.path, folder.num_weight_bytes
        self.expect(folder.content_id)

    def take_waited_s(self) -> float:
        """Return `waited_s`, once."""
        waited_s, self.waited_s = self.waited_s, 0.0
        return waited_s

    def close(self) -> None:
        """Let go of the staged copy, or give up staging it. Safe to repeat."""
        if self.staging is not None:
            self.staging.cancel()
            self.staging = None
        if self.staged is not None:
            self.staged.close()
            self.staged = None


def open_model(job: RunConfig, *, progress: Progress) -> RunModel:
    """Stage the weights if they are elsewhere, and check them without loading them.

    Raises:
        ModelError, StorageError: missing, damaged or refused files, by name.
        EngineConfigError: `engine.max_model_len` exceeds what the model was made for, or
            `engine.tensor_parallel_size` does not divide its heads.
    """
    if _is_dummy(job):
        return _dummy(job)
    from tasks.stage import describe, stage_for  # boto3, which takes a while to import

    started = time.monotonic()
    progress.phase = "staging the model"
    staged = stage_for(job, on_progress=progress.staged)
    log.info("%s", describe(staged.report))
    return _whole(job, staged, time.monotonic() - started)


def peek_model(job: RunConfig, *, work_dir: Path, progress: Progress) -> RunModel:
    """Look at the model: weights are moved only when an engine asks for them, if it does.

    A model that is here already is used as it is; one that only staging can make known (a GGUF file,
    many files on the Hub) is staged. Raises as `open_model` does.
    """
    if _is_dummy(job):
        return _dummy(job)
    from tasks.stage import find_for, look_at

    staged = find_for(job)
    if staged is not None:
        return _whole(job, staged, 0.0)
    progress.phase = "looking at the model"
    folder = work_dir / "model"
    folder.mkdir(mode=0o700, exist_ok=True)
    seen = look_at(job, folder, sample_spans)
    if seen is None:
        log.info("%s: is staged whole, for nothing less tells which model it is", job.model.source)
        return open_model(job, progress=progress)
    found = check_sampled_folder(
        folder, (WeightSample(*file) for file in seen.files), job.model.allowed_code
    )
    _check_ranks(job, folder)
    _check_engine(job, check_small_files(folder, job.model.allowed_code))
    return RunModel(
        path=folder,
        content_id=found.content_id,
        max_model_len=_max_model_len(job, found.config),
        uri=seen.uri,
        allowed_code=job.model.allowed_code,
        num_weight_bytes=found.num_weight_bytes,
        start=lambda: StageThread(job, progress),
    )


def begin_model(job: RunConfig, *, progress: Progress) -> RunModel:
    """Begin to stage the model and return once its config and tokenizer are here.

    Raises as `open_model` does; what goes wrong later is raised by the engine that loads, or by `wait`.
    """
    if _is_dummy(job):
        return _dummy(job)
    started = time.monotonic()
    progress.phase = "staging the model"
    staging = StageThread(job, progress)
    try:
        path = staging.files.folder()
        if staging.files.is_done:
            return _whole(job, staging.result(), time.monotonic() - started)
        small = check_small_files(path, job.model.allowed_code)
        _check_ranks(job, path)
        _check_engine(job, small)
        return RunModel(
            path=path,
            allowed_code=job.model.allowed_code,
            max_model_len=_max_model_len(job, small.config),
            stage_s=time.monotonic() - started,
            staging=staging,
        )
    except BaseException:
        staging.cancel()
        raise


def _is_dummy(job: RunConfig) -> bool:
    return job.engine.backend == "dummy"


def _dummy(job: RunConfig) -> RunModel:
    limit = job.engine.max_model_len
    return RunModel(
        path=DUMMY_MODEL_DIR,
        content_id="dummy",
        max_model_len=_DUMMY_MAX_MODEL_LEN if limit == "auto" else limit,
    )


def _whole(job: RunConfig, staged: Any, stage_s: float) -> RunModel:
    try:
        folder = check_model_folder(staged.path, job.model.allowed_code)
        max_model_len = _max_model_len(job, folder.config)
        _check_ranks(job, folder.path)
        _check_engine(job, folder)
    except BaseException:
        staged.close()
        raise
    return RunModel(
        path=folder.path,
        content_id=folder.content_id,
        max_model_len=max_model_len,
        uri=staged.report.source,
        num_weight_bytes=folder.num_weight_bytes,
        stage_s=stage_s,
        staged=staged,
    )


def _check_ranks(job: RunConfig, folder: Path) -> None:
    """Refuse a tensor parallel size that cannot work, before anything is planned."""
    size = job.engine.num_ranks
    if size == 1:
        return
    backend = settle_backend(job, folder).engine.backend
    if backend == "zero":
        return  # its ranks share the weights, and each runs whole heads
    if backend == "transformers":
        raise EngineConfigError(
            f"engine.tensor_parallel_size is {size}: the transformers backend runs in one process; "
            f"use 1, or engine.backend paged"
        )
    shape = read_model_shape(folder)
    check_heads(size, num_heads=shape.num_attention_heads, num_kv_heads=shape.num_key_value_heads)


def _check_engine(job: RunConfig, folder: SmallFiles) -> None:
    """Refuse quantisation and offload that cannot work, before anything is planned."""
    knobs = settle_backend(job, folder.path).engine
    config = EngineConfig(
        model=str(folder.path),
        backend=knobs.backend,
        dtype=job.model.dtype,
        allowed_code=tuple(job.model.allowed_code),
        quantization=job.model.quantization,
        kv_cache_dtype=knobs.kv_cache_dtype,
        tensor_parallel_size=knobs.num_ranks,
        offload=knobs.offload,
        nvme_path=knobs.nvme_path,
    )
    check_engine(folder, config, is_here=job.hardware.provider in HERE)


def _max_model_len(job: RunConfig, config: dict[str, Any]) -> int:
    own = config.get("max_position_embeddings") or config.get("text_config", {}).get(
        "max_position_embeddings"
    )
    wanted = job.engine.max_model_len
    if wanted == "auto":
        if own is None:
            raise EngineConfigError(
                "engine.max_model_len: the model's config names no max_position_embeddings; give a number"
            )
        return int(own)
    if own is not None and wanted > own:
        raise EngineConfigError(
            f"engine.max_model_len: {wanted} tokens, the model was made for {own}; lower it"
        )
    return wanted
