"""TokenTally: which tokens each slot's sequence has had, on the device, for the penalties that ask.

    tally [slots,W] int16     bits 0 to 14: occurrences in the completion; the sign bit: is in the prompt

A sequence's row is written when it starts in its slot, with what it has by then: nothing of the past is kept
anywhere else, so a sequence that was preempted, or admitted with tokens, starts right. From there on each step's
kernels count what they choose; for a step that the host samples, the host does.

Memory: two bytes for each slot and column, at most MAX_BYTES (a vocabulary of 262,144 at 1,024 slots). The memory plan
sets them aside; the first row with penalties has them allocated, or the warm-up of a run that is to have some. The host samples the steps with rows that do not fit:
those in slots past the last one here, and those with a frequency penalty and more tokens than a count holds.

W columns of the vocabulary here, from token `start` on
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.sampler import SamplerRow
from inference.vocabulary import PartitionedVocabulary, WholeVocabulary

MAX_BYTES = 512 * 2**20
MAX_TOKENS = 2**15 - 1
"""The largest count."""

IN_PROMPT = -(2**15)


class TokenTally:
    """A row per slot, as far as MAX_BYTES go."""

    def __init__(
        self,
        num_slots: int,
        vocabulary: WholeVocabulary,
        device: torch.device,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._width = vocabulary.size
        if isinstance(vocabulary, PartitionedVocabulary):
            self._width = vocabulary.width
        self._start = vocabulary.start
        self._device = device
        # The same on every rank, so that all send the same rows to the host.
        self.num_slots = min(num_slots, max_bytes // (2 * self._width))
        self._table: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """What it takes once it is needed."""
        return 2 * self.num_slots * self._width

    @property
    def table(self) -> Tensor:
        """[slots,W]; before any sequence has started, one row of zeros, for kernels that are compiled or measured."""
        return self._zeros(1) if self._table is None else self._table

    def allocated(self) -> Tensor:
        """[slots,W], which stays where it is from now on: what a graph must have been captured with.

        Raises:
            torch.OutOfMemoryError: the device has not the memory that the plan set aside.
        """
        if self._table is None:
            self._table = self._zeros(self.num_slots)
        return self._table

    def holds(self, slot: int, row: SamplerRow) -> bool:
        """Whether a row can be counted in this slot."""
        sampling = row.sampling
        return slot < self.num_slots and (
            sampling.frequency_penalty == 0.0 or sampling.max_tokens <= MAX_TOKENS
        )

    def start(self, slot: int, row: SamplerRow) -> None:
        """Write the row of a sequence that starts in a slot; the first one has the table allocated.

        Raises:
            torch.OutOfMemoryError: the device has not the memory that the plan set aside.
        """
        counts_W = self.allocated()[slot].zero_()
        if row.sampling.repetition_penalty != 1.0:
            counts_W.index_fill_(0, self._sent(self._here(row.prompt_token_ids)), IN_PROMPT)
        if row.token_ids:
            columns, counts = np.unique(self._here(row.token_ids), return_counts=True)
            sent = self._sent(np.stack([columns, counts.clip(max=MAX_TOKENS)]))
            counts_W.index_add_(0, sent[0], sent[1].to(torch.int16))

    def count(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Count one more token in each of these slots, which the host has chosen; a negative one is none."""
        assert self._table is not None, "no sequence has started"
        columns = np.asarray(token_ids, np.int64) - self._start
        is_here = (np.asarray(token_ids) >= 0) & (columns >= 0) & (columns < self._width)
        cells = self._sent((np.asarray(slots, np.int64) * self._width + columns)[is_here])
        flat = self._table.view(-1)
        seen = flat[cells]
        flat[cells] = seen + ((seen & MAX_TOKENS) < MAX_TOKENS).to(torch.int16)

    def _zeros(self, num_slots: int) -> Tensor:
        return torch.zeros(num_slots, self._width, dtype=torch.int16, device=self._device)

    def _here(self, token_ids: Sequence[int]) -> Any:
        columns = np.asarray(token_ids, np.int64) - self._start
        return columns[(columns >= 0) & (columns < self._width)]

    def _sent(self, array: Any) -> Tensor:
        """Bring an array to the device without waiting for it."""
        host = torch.from_numpy(array)
        if self._device.type == "cuda" and array.size:
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)
