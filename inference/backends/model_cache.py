"""ModelCache: a transformers model and the KV cache of one left-padded batch.

B slots   L columns (tokens of the longest row so far)   V vocabulary
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class ModelCache:
    """Prefill once, then decode column by column; padding is on the left and never attended to."""

    def __init__(
        self, model: Any, device: torch.device, token_ids: Sequence[Sequence[int]]
    ) -> None:
        """Begin a batch of these rows' tokens; `prefill` runs them."""
        from transformers import DynamicCache

        self._model = model
        self._device = device
        self._cache: Any = DynamicCache(config=model.config)
        parameters = inspect.signature(model.forward).parameters
        # transformers renamed the argument; the older name comes first in neither.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        # Only the last column's logits: prefill would otherwise make [B, L, V].
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        num_columns = max(len(row) for row in token_ids)
        padded = [[0] * (num_columns - len(row)) + list(row) for row in token_ids]
        mask = [[0] * (num_columns - len(row)) + [1] * len(row) for row in token_ids]
        self._ids_BL = torch.tensor(padded, dtype=torch.int64, device=device)
        self._mask_BL = torch.tensor(mask, dtype=torch.int64, device=device)
        self._positions_BL = (self._mask_BL.cumsum(dim=-1) - 1).clamp(min=0)
        self._positions_B = self._positions_BL[:, -1]
        self._num_cached = 0

    @property
    def can_select(self) -> bool:
        """Whether slots can be dropped."""
        return hasattr(self._cache, "batch_select_indices")

    def prefill(self, max_columns: int) -> Tensor | None:
        """Run the next columns; return the logits after each row's last token, [B, V], once all have run."""
        start, stop = self._num_cached, self._num_cached + max_columns
        logits_BV = self._run(
            self._ids_BL[:, start:stop], self._positions_BL[:, start:stop], self._mask_BL[:, :stop]
        )
        self._num_cached = stop
        return logits_BV if stop >= self._ids_BL.shape[1] else None

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        """Add one token to every slot; return the logits after it, [B, V]."""
        ids_B1 = torch.tensor(token_ids, dtype=torch.int64, device=self._device)[:, None]
        self._mask_BL = torch.nn.functional.pad(self._mask_BL, (0, 1), value=1)
        self._positions_B = self._positions_B + 1
        return self._run(ids_B1, self._positions_B[:, None], self._mask_BL)

    def select(self, slots: Sequence[int]) -> None:
        """Keep only these slots, in this order."""
        slots_R = torch.tensor(slots, dtype=torch.int64, device=self._device)
        self._cache.batch_select_indices(slots_R)
        self._mask_BL = self._mask_BL[slots_R]
        self._positions_B = self._positions_B[slots_R]

    def _run(self, ids_BL: Tensor, positions_BL: Tensor, mask_BL: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            position_ids=positions_BL,
            use_cache=True,
            **{self._cache_name: self._cache},
            **self._options,
        )
        logits: Tensor = output.logits[:, -1]
        return logits
