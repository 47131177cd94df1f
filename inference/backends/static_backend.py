"""StaticBackend: static batches through an unmodified model class; what transformers and zero have in common.

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
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from inference.backends.base import BackendInfo, EngineStats
from inference.backends.checks import check_sequence
from inference.backends.row import Row, RowMaker
from inference.backends.static_batch import StaticBatch
from inference.config import Backend as BackendName
from inference.config import EngineConfig
from inference.end_tokens import end_token_ids
from inference.errors import EngineConfigError, EngineFault
from inference.loading import dtype_name, load_tokenizer
from inference.sequence import Completion, Sequence
from inference.weights import ModelFolder, check_model_folder

logger = logging.getLogger(__name__)

_WINDOW_BATCHES = 16  # sequences are sorted among this many batches, so none waits for long


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticLimits:
    """How large a batch may be."""

    max_num_seqs: int
    max_pass_tokens: int
    """Rows times columns of one forward pass, but one row always runs."""

    max_cache_tokens: int | None = None
    """Rows times the longest prompt and completion of a batch; its prompts then run in several
    passes. None: a batch is as large as one pass takes."""


class StaticBackend(ABC):
    """See `inference.backends.base.Backend` for the protocol. A subclass loads the model and sizes batches."""

    name: ClassVar[BackendName]

    def __init__(self, config: EngineConfig) -> None:
        """Check the folder, then load the model.

        Raises:
            ModelError: the model folder is unusable.
            EngineConfigError: the settings cannot work on this model or machine.
        """
        started_at = time.perf_counter()
        folder = check_model_folder(config.model, config.allowed_code)
        max_model_len = _max_model_len(folder, config)
        self._check(folder, config)
        self.tokenizer = load_tokenizer(folder)
        self._model: Any
        self._device: torch.device
        self._model, self._device = self._load(folder, config)
        self._limits = self._batch_limits(config, max_model_len)
        self._max_num_seqs = self._limits.max_num_seqs
        self._end_token_ids = end_token_ids(folder.path, self.tokenizer)
        self._make_row = RowMaker(self.tokenizer, self._end_token_ids, max_model_len)
        is_cuda = self._device.type == "cuda"
        self._info = BackendInfo(
            backend=self.name,
            device=torch.cuda.get_device_name(self._device) if is_cuda else "cpu",
            dtype=dtype_name(self._model.dtype),
            max_model_len=max_model_len,
            max_num_seqs=self._max_num_seqs,
            load_s=time.perf_counter() - started_at,
            memory=self._memory(),
        )
        self._stats = EngineStats()
        self._seq_ids: set[int] = set()
        self._waiting: deque[Sequence] = deque()
        self._ready: list[Row] = []  # sorted; the next batch is taken from the end
        self._is_longest_next = False
        self._batch: StaticBatch | None = None

    @abstractmethod
    def _check(self, folder: ModelFolder, config: EngineConfig) -> None:
        """Refuse what cannot work, before anything is loaded. Raises EngineConfigError."""

    @abstractmethod
    def _load(self, folder: ModelFolder, config: EngineConfig) -> tuple[Any, torch.device]:
        """Return the model, and the device its inputs are given on."""

    @abstractmethod
    def _batch_limits(self, config: EngineConfig, max_model_len: int) -> StaticLimits:
        """Size batches for the loaded model."""

    @abstractmethod
    def _memory(self) -> dict[str, int]:
        """Return the bytes reserved, by purpose."""

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
        """Run the next pass of the running batch, or the first of the next: a prefill, or one token a row.

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
        longest = longest_end = 0
        while self._ready and len(rows) < self._max_num_seqs:
            row = self._ready[-1]
            longest = max(longest, row.num_tokens)
            longest_end = max(longest_end, row.max_num_tokens)
            if rows and not self._fits(len(rows) + 1, longest, longest_end):
                break
            rows.append(self._ready.pop())
        return StaticBatch(rows, self._limits.max_pass_tokens) if rows else None

    def _fits(self, num_rows: int, longest: int, longest_end: int) -> bool:
        """Whether rows of up to `longest` tokens now, and `longest_end` at the end, may run together."""
        if self._limits.max_cache_tokens is None:
            return num_rows * longest <= self._limits.max_pass_tokens
        return num_rows * longest_end <= self._limits.max_cache_tokens

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
        """Run one pass of the batch; return the rows it finished."""
        started_at = time.perf_counter()
        is_prefill = batch.is_new
        try:
            logits_BV = self._run(batch)
        except torch.OutOfMemoryError:
            return self._shrink(batch)
        finished = [] if logits_BV is None else batch.take(logits_BV, self._end_token_ids)
        self._stats.num_steps += 1
        elapsed_s = time.perf_counter() - started_at
        if is_prefill:
            self._stats.num_prompt_tokens += 0 if batch.is_new else batch.num_prompt_tokens
            self._stats.prefill_s += elapsed_s
        else:
            self._stats.decode_s += elapsed_s
        if self._device.type == "cuda":
            self._stats.peak_device_bytes = torch.cuda.max_memory_allocated(self._device)
        return finished

    def _run(self, batch: StaticBatch) -> Tensor | None:
        """Return the batch's logits [B, V], or None while more of its prompts are to come.

        Raises:
            torch.OutOfMemoryError: the device is out of memory.
            EngineFault: anything else.
        """
        try:
            with torch.inference_mode():
                return self._forward(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The CPU allocator has no class of its own for it.
            if "not enough memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise EngineFault(
                f"the model failed on a batch of {len(batch.rows)}: {error}"
            ) from error

    def _forward(self, batch: StaticBatch) -> Tensor | None:
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


def resolve(value: int | str, default: int) -> int:
    """Return the knob's value, or the default for `auto`."""
    return default if isinstance(value, str) else value


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


def _free_memory() -> None:
    # On the CPU there is no pool to give back, and the collector comes by itself.
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
