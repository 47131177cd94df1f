"""TransformersBackend: the reference. Right before fast: static batches through an unmodified model class.

Sequences wait in arrival order, are taken in windows, sorted by length, and run in batches of neighbours:
one prefill, then one token per row and step. Rows that finish leave the batch when enough have; new
sequences start with the next batch.

    waiting --window, sorted--> ready --batch--> running --end token, stop, length--> finished
                                  ^                 |
                                  +--out of memory--+     recomputed in half the batch, with the same draws

    B rows in the batch   V vocabulary
"""

import gc
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from inference.backends.base import BackendInfo, EngineStats
from inference.backends.checks import check_sequence
from inference.backends.row import Row, RowMaker
from inference.backends.static_batch import StaticBatch
from inference.config import EngineConfig
from inference.end_tokens import end_token_ids
from inference.errors import EngineConfigError, EngineFault
from inference.loading import dtype_name, load_model, load_tokenizer
from inference.sequence import Completion, Sequence
from inference.weights import ModelFolder, check_model_folder

logger = logging.getLogger(__name__)

_DEFAULT_MAX_NUM_SEQS = {"cpu": 32, "cuda": 128}
_DEFAULT_MAX_NUM_BATCHED_TOKENS = {"cpu": 8_192, "cuda": 65_536}
_WINDOW_BATCHES = 16  # sequences are sorted among this many batches, so none waits for long


class TransformersBackend:
    """See `inference.backends.base.Backend` for the protocol."""

    def __init__(
        self, config: EngineConfig, *, device_map: Mapping[str, Any] | str | None = None
    ) -> None:
        """Load the model.

        Raises:
            ModelError: the model folder is unusable.
            EngineConfigError: the settings cannot work on this model or machine.
        """
        started_at = time.perf_counter()
        folder = check_model_folder(config.model)
        max_model_len = _max_model_len(folder, config)
        _check_config(config)
        self.tokenizer = load_tokenizer(folder)
        self._model: Any = load_model(folder, config, device_map)
        self._device: torch.device = self._model.get_input_embeddings().weight.device
        if (
            self._device.type == "meta"
        ):  # offloaded by accelerate, whose hooks move inputs from here
            self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kind = "cuda" if self._device.type == "cuda" else "cpu"
        self._end_token_ids = end_token_ids(folder.path, self.tokenizer)
        self._make_row = RowMaker(self.tokenizer, self._end_token_ids, max_model_len)
        self._max_num_seqs = _resolve(config.max_num_seqs, _DEFAULT_MAX_NUM_SEQS[kind])
        self._max_num_batched_tokens = _resolve(
            config.max_num_batched_tokens, _DEFAULT_MAX_NUM_BATCHED_TOKENS[kind]
        )
        self._info = BackendInfo(
            backend="transformers",
            device=torch.cuda.get_device_name(self._device) if kind == "cuda" else "cpu",
            dtype=dtype_name(self._model.dtype),
            max_model_len=max_model_len,
            max_num_seqs=self._max_num_seqs,
            load_s=time.perf_counter() - started_at,
            memory={"weights": int(self._model.get_memory_footprint())},
        )
        self._stats = EngineStats()
        self._seq_ids: set[int] = set()
        self._waiting: deque[Sequence] = deque()
        self._ready: list[Row] = []  # sorted; the next batch is taken from the end
        self._is_longest_next = False
        self._batch: StaticBatch | None = None

    @property
    def info(self) -> BackendInfo:
        """What was built."""
        return self._info

    @property
    def stats(self) -> EngineStats:
        """Totals so far; the same object, updated in place."""
        return self._stats

    @property
    def num_unfinished(self) -> int:
        """Sequences submitted and not yet returned."""
        return len(self._seq_ids)

    @property
    def num_waiting(self) -> int:
        """Sequences submitted and not yet started."""
        return len(self._waiting) + len(self._ready)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences; see `inference.backends.checks.check_sequence` for what is refused."""
        for sequence in sequences:
            check_sequence(sequence, self._seq_ids, self._info.max_model_len)
            self._seq_ids.add(sequence.seq_id)
            self._waiting.append(sequence)

    def step(self) -> list[Completion]:
        """Prefill the next batch, or add one token to every row of the running one.

        Raises:
            EngineFault: the model failed for a reason other than memory.
        """
        if self._batch is None:
            self._batch = self._next_batch()
        if self._batch is None:
            return []
        finished = self._advance(self._batch)
        for row in finished:
            self._seq_ids.remove(row.sequence.seq_id)
            self._stats.num_completion_tokens += len(row.token_ids)
        if self._batch is not None and not self._batch.rows:
            self._batch = None
        return [row.completion() for row in finished]

    def close(self) -> None:
        """Free the model and forget everything submitted. Safe to repeat."""
        self._batch = self._model = None
        self._waiting.clear()
        self._ready.clear()
        self._seq_ids.clear()
        _free_memory()

    def _next_batch(self) -> StaticBatch | None:
        if len(self._ready) < self._max_num_seqs and self._waiting:
            self._fill_window()
        rows: list[Row] = []
        longest = 0
        while self._ready and len(rows) < self._max_num_seqs:
            longest = max(longest, self._ready[-1].num_tokens)
            if rows and longest * (len(rows) + 1) > self._max_num_batched_tokens:
                break
            rows.append(self._ready.pop())
        return StaticBatch(rows) if rows else None

    def _fill_window(self) -> None:
        """Sort what has waited longest into `_ready`, with what a smaller batch left there."""
        while self._waiting and len(self._ready) < _WINDOW_BATCHES * self._max_num_seqs:
            self._ready.append(self._make_row(self._waiting.popleft()))
        # Alternate windows run longest first and shortest first: where two meet, rows are alike, and what one
        # window left over is first in the next.
        self._ready.sort(
            key=lambda row: (row.num_tokens, row.max_tokens), reverse=not self._is_longest_next
        )
        self._is_longest_next = not self._is_longest_next

    def _advance(self, batch: StaticBatch) -> list[Row]:
        """Run one step of the batch; return the rows it finished."""
        started_at = time.perf_counter()
        is_prefill = batch.is_new
        logits_BV = self._logits_or_none(batch)
        if logits_BV is None:
            return self._shrink(batch)
        finished = batch.take(logits_BV, self._end_token_ids)
        self._stats.num_steps += 1
        elapsed_s = time.perf_counter() - started_at
        if is_prefill:
            self._stats.num_prompt_tokens += batch.num_prompt_tokens
            self._stats.prefill_s += elapsed_s
        else:
            self._stats.decode_s += elapsed_s
        if self._device.type == "cuda":
            self._stats.peak_device_bytes = torch.cuda.max_memory_allocated(self._device)
        return finished

    def _logits_or_none(self, batch: StaticBatch) -> Tensor | None:
        """Return the batch's logits [B, V], or None when the device is out of memory."""
        try:
            with torch.inference_mode():
                return self._forward(batch)
        except torch.OutOfMemoryError:
            return None
        except RuntimeError as error:
            if "not enough memory" in str(
                error
            ):  # the CPU allocator has no class of its own for it
                return None
            raise EngineFault(
                f"the model failed on a batch of {len(batch.rows)}: {error}"
            ) from error

    def _forward(self, batch: StaticBatch) -> Tensor:
        """Run the model on the batch's next tokens."""
        return batch.forward(self._model, self._device)

    def _shrink(self, batch: StaticBatch) -> list[Row]:
        """Put the batch's rows back for half the batch; a row that does not fit alone has failed."""
        num_rows, num_tokens = len(batch.rows), batch.num_columns
        self._batch = None
        batch.drop_cache()
        _free_memory()
        self._stats.num_preemptions += num_rows
        if num_rows == 1:
            logger.warning("out of memory with one sequence of %d tokens: it fails", num_tokens)
            batch.rows[0].fail(
                f"out of memory with this sequence alone ({num_tokens} tokens); "
                f"lower engine.max_model_len or use a larger device"
            )
            return batch.rows
        self._max_num_seqs = max(1, num_rows // 2)
        logger.warning(
            "out of memory with %d sequences of %d tokens: going on with at most %d at once",
            num_rows,
            num_tokens,
            self._max_num_seqs,
        )
        self._ready.extend(reversed(batch.rows))
        return []


def _max_model_len(folder: ModelFolder, config: EngineConfig) -> int:
    text_config = folder.config.get("text_config") or folder.config
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    limits = [int(text_config[name]) for name in names if text_config.get(name)]
    if config.max_model_len == "auto":
        if not limits:
            raise EngineConfigError(
                f"{folder.path}: config.json names no longest length; set engine.max_model_len"
            )
        return limits[0]
    if limits and config.max_model_len > limits[0]:
        raise EngineConfigError(
            f"engine.max_model_len is {config.max_model_len}, but the model handles {limits[0]} tokens; "
            f"lower it"
        )
    return config.max_model_len


def _check_config(config: EngineConfig) -> None:
    if config.tensor_parallel_size != 1:
        raise EngineConfigError(
            f"engine.tensor_parallel_size is {config.tensor_parallel_size}: the transformers backend "
            f"runs in one process; use 1, or engine.backend paged"
        )
    if config.kv_cache_dtype not in ("auto", config.dtype):
        raise EngineConfigError(
            f"engine.kv_cache_dtype is {config.kv_cache_dtype}: the transformers backend keeps the "
            f"model's own; use auto, or engine.backend paged"
        )


def _resolve(value: int | str, default: int) -> int:
    return default if isinstance(value, str) else value


def _free_memory() -> None:
    # On the CPU there is no pool to give back, and the collector comes by itself.
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
