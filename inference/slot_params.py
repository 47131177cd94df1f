"""SlotParams: each slot's sampling parameters, as the sampling kernels read them."""

from typing import Any

import numpy as np
import torch

from inference.sampler import SamplerRow

TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED_LOW, SEED_HIGH = range(6)
"""Fields of a slot, int32; real numbers as the bits of their fp32."""

FIRST_STOP_ID, MAX_STOP_IDS = 16, 16
"""Where a slot's end tokens begin, and how many it may have; -1 for none."""

NUM_PARAMS = 32

STOPPED = 1 << 30
"""Set in a result whose token ends its sequence; a negative result is a row without a usable token."""


class SlotParams:
    """A table [slots, 32] on the device and its host copy."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(num_slots, NUM_PARAMS, dtype=torch.int32, pin_memory=is_cuda)
        self._table: Any = self._host.numpy()
        self._is_slow = np.zeros(num_slots, bool)
        self.on_device = self._host.to(device, copy=True)
        self.has_draws = False
        """Whether any slot so far had a temperature; then all heads are captured with draws."""

        self.has_floors = False

    def write(self, slot: int, row: SamplerRow) -> None:
        """Set a slot's parameters."""
        sampling = row.sampling
        fields = self._table[slot]
        fields[:] = 0
        reals = np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float32)
        fields[[TEMPERATURE, TOP_P, MIN_P]] = reals.view(np.int32)
        fields[TOP_K] = min(sampling.top_k, np.iinfo(np.int32).max)
        seed = np.array([row.draw_seed & (2**64 - 1)], np.uint64)
        fields[[SEED_LOW, SEED_HIGH]] = seed.view(np.int32)
        stop_ids = stop_ids_of(row)
        fields[FIRST_STOP_ID:] = -1
        if len(stop_ids) <= MAX_STOP_IDS:
            fields[FIRST_STOP_ID : FIRST_STOP_ID + len(stop_ids)] = sorted(stop_ids)
        self._is_slow[slot] = not self.is_fast(row)
        self.has_draws |= not sampling.is_greedy
        self.has_floors |= bool(sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0)
        self.on_device[slot].copy_(self._host[slot], non_blocking=True)

    @property
    def has_slow(self) -> bool:
        """Whether some slot, in use or not, was last given parameters that the kernels cannot sample."""
        return bool(self._is_slow.any())

    def are_fast(self, slots: Any) -> bool:
        """Whether the kernels can sample all these slots."""
        return not self.has_slow or not self._is_slow[slots].any()

    @staticmethod
    def is_fast(row: SamplerRow) -> bool:
        """Whether the kernels can sample this row: nothing in it depends on the tokens so far."""
        sampling = row.sampling
        return (
            sampling.repetition_penalty == 1.0
            and sampling.presence_penalty == 0.0
            and sampling.frequency_penalty == 0.0
            and sampling.min_tokens == 0
            and sampling.logprobs is None
            and len(stop_ids_of(row)) <= MAX_STOP_IDS
        )


def stop_ids_of(row: SamplerRow) -> set[int]:
    """Return the tokens that end this row's sequence."""
    stop_ids = set(row.sampling.stop_token_ids)
    return stop_ids if row.sampling.ignore_eos else stop_ids | set(row.end_token_ids)
