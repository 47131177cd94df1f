"""From `model.source` to a checked local folder."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.backends import resolve_backend
from inference.backends.dummy_tokenizer import DUMMY_MODEL_DIR
from inference.errors import EngineConfigError
from inference.heads import check_heads, check_quantization
from inference.model_config import read_model_shape
from inference.weights import ModelFolder, check_model_folder
from tasks.job import RunConfig
from tasks.progress import Progress

log = logging.getLogger("nightjar.model")

_DUMMY_MAX_MODEL_LEN = 32_768


@dataclass(slots=True)
class RunModel:
    """The weights of a run, staged and checked; closing gives the staged copy free."""

    path: Path
    content_id: str
    max_model_len: int
    stage_s: float = 0.0
    staged: Any = field(default=None, repr=False)

    def close(self) -> None:
        """Let go of the staged copy. Safe to repeat."""
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
    if resolve_backend(job.engine.backend) == "dummy":
        limit = job.engine.max_model_len
        return RunModel(
            path=DUMMY_MODEL_DIR,
            content_id="dummy",
            max_model_len=_DUMMY_MAX_MODEL_LEN if limit == "auto" else limit,
        )
    from tasks.stage import describe, stage_for  # boto3, which takes a while to import

    started = time.monotonic()
    progress.phase = "staging the model"
    staged = stage_for(job, on_progress=progress.staged)
    try:
        folder = check_model_folder(staged.path)
        max_model_len = _max_model_len(job, folder.config)
        _check_ranks(job, folder)
    except BaseException:
        staged.close()
        raise
    log.info("%s", describe(staged.report))
    return RunModel(
        path=folder.path,
        content_id=folder.content_id,
        max_model_len=max_model_len,
        stage_s=time.monotonic() - started,
        staged=staged,
    )


def _check_ranks(job: RunConfig, folder: ModelFolder) -> None:
    """Refuse a tensor parallel size that cannot work, before anything is planned."""
    size = job.engine.num_ranks
    if size == 1:
        return
    if resolve_backend(job.engine.backend) == "transformers":
        raise EngineConfigError(
            f"engine.tensor_parallel_size is {size}: the transformers backend runs in one process; "
            f"use 1, or engine.backend paged"
        )
    shape = read_model_shape(folder.path)
    check_heads(size, num_heads=shape.num_attention_heads, num_kv_heads=shape.num_key_value_heads)
    check_quantization(
        size, job.model.quantization, is_stored=bool(folder.config.get("quantization_config"))
    )


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
