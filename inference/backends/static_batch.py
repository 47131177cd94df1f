"""StaticBatch: rows that start together and leave one by one.

B open rows   V vocabulary
"""

from typing import Any

import torch
from torch import Tensor

from inference.backends.model_cache import ModelCache
from inference.backends.row import Row
from inference.sampler import NO_TOKEN, SamplerRow, sample


class StaticBatch:
    """Rows that run together, left-padded to one length."""

    def __init__(self, rows: list[Row], max_pass_tokens: int) -> None:
        self.rows = rows
        self.is_new = True
        """Whether prompts are still to be run."""

        self._max_pass_tokens = max_pass_tokens
        self.num_columns = max(row.num_tokens for row in rows)
        # Prompts run for the first time; a recomputed row's was counted before.
        self.num_prompt_tokens = sum(
            len(row.sequence.prompt_token_ids) for row in rows if not row.token_ids
        )
        self._slots = list(range(len(rows)))  # slots[i]: the row's place in the cache's batch
        self._num_slots = len(rows)
        self._cache: ModelCache | None = None

    def forward(self, model: Any, device: torch.device) -> Tensor | None:
        """Run one pass; return the logits after each open row's last token, [B, V].

        None while prompts are longer than the passes so far.
        """
        if self._cache is None:
            self._cache = ModelCache(model, device, [row.all_token_ids for row in self.rows])
        if self.is_new:
            logits_BV = self._cache.prefill(max(1, self._max_pass_tokens // len(self.rows)))
            self.is_new = logits_BV is None
            return logits_BV
        if len(self._slots) <= self._num_slots * 3 // 4 and self._cache.can_select:
            self._cache.select(self._slots)  # copies the cache, so only when a quarter is gone
            self._num_slots, self._slots = len(self._slots), list(range(len(self._slots)))
        next_ids = [0] * self._num_slots  # finished rows run on with any token; nobody looks
        for slot, row in zip(self._slots, self.rows, strict=True):
            next_ids[slot] = row.token_ids[-1]
        self.num_columns += 1
        return self._cache.decode(next_ids)[self._slots]

    def take(self, logits_BV: Tensor, end_ids: frozenset[int]) -> list[Row]:
        """Sample every row's next token; remove and return the rows it finished."""
        sampled = sample(logits_BV, [_sampler_row(row, end_ids) for row in self.rows])
        finished: list[Row] = []
        open_rows: list[Row] = []
        open_slots: list[int] = []
        for i, row in enumerate(self.rows):
            if sampled.token_ids[i] == NO_TOKEN:
                row.fail("the model gave no usable logits (NaN, infinite, or every token banned)")
            else:
                row.append(sampled.token_ids[i], sampled.logprobs[i])
            if row.finish_reason is None:
                open_rows.append(row)
                open_slots.append(self._slots[i])
            else:
                finished.append(row)
        self.rows, self._slots = open_rows, open_slots
        return finished

    def drop_cache(self) -> None:
        """Free the KV cache; the batch cannot go on."""
        self._cache = None


def _sampler_row(row: Row, end_ids: frozenset[int]) -> SamplerRow:
    sequence = row.sequence
    return SamplerRow(
        sampling=sequence.sampling,
        draw_seed=sequence.draw_seed,
        prompt_token_ids=sequence.prompt_token_ids,
        token_ids=row.token_ids,
        end_token_ids=end_ids,
    )
