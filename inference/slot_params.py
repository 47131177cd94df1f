"""SlotParams: each slot's sampling parameters, as the sampling kernels read them."""

from typing import Any

import numpy as np
import torch

from inference.sampler import SamplerRow
from inference.sampling_needs import SamplingNeeds, has_floors, has_penalty
from inference.tally import TokenTally

TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED_LOW, SEED_HIGH = range(6)
REPETITION, PRESENCE, FREQUENCY, MIN_TOKENS, IS_TALLIED, LOGPROBS = range(6, 12)
"""Fields of a slot, int32; real numbers as the bits of their fp32. IS_TALLIED: it has penalties, and a row in the
tally. LOGPROBS: one more than the most likely tokens asked for; 0 for no log-probabilities."""

FIRST_STOP_ID, MAX_STOP_IDS = 16, 16
"""Where a slot's end tokens begin, and how many it may have; -1 for none."""

NUM_PARAMS = 32

STOPPED = 1 << 30
"""Set in a result whose token ends its sequence; a negative result is a row without a usable token."""


class SlotParams:
    """A table [slots, 32] on the device and its host copy."""

    def __init__(
        self, num_slots: int, device: torch.device, tally: TokenTally | None = None
    ) -> None:
        """Without a tally, rows with penalties are left to the reference sampler."""
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(num_slots, NUM_PARAMS, dtype=torch.int32, pin_memory=is_cuda)
        self._table: Any = self._host.numpy()
        self._is_slow = np.zeros(num_slots, bool)
        self.on_device = self._host.to(device, copy=True)
        self._tally = tally
        self.has_draws = False
        """Whether any slot so far had a temperature; then all heads are captured with draws."""

        self.has_floors = False
        self.has_penalties = False
        self.has_bans = False
        self.has_logprobs = False

    @property
    def needs(self) -> SamplingNeeds:
        """What heads sample: what was expected, and what any slot has asked for since."""
        return SamplingNeeds(
            draws=self.has_draws,
            floors=self.has_floors,
            penalties=self.has_penalties,
            bans=self.has_bans,
            logprobs=self.has_logprobs,
        )

    def expect(self, needs: SamplingNeeds) -> None:
        """Have heads sample this much and no more, until rows ask."""
        self.has_draws, self.has_floors = needs.draws, needs.floors
        self.has_penalties, self.has_bans = needs.penalties, needs.bans
        self.has_logprobs = needs.logprobs

    def write(self, slot: int, row: SamplerRow) -> None:
        """Set a slot's parameters, and its row in the tally if it has penalties.

        Raises:
            torch.OutOfMemoryError: see `TokenTally.start`.
        """
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
        self._is_slow[slot] = not self.is_fast(slot, row)
        self._write_past(slot, row)
        if sampling.logprobs is not None:
            fields[LOGPROBS] = 1 + sampling.logprobs
            self.has_logprobs = True
        self.has_draws |= not sampling.is_greedy
        self.has_floors |= has_floors(sampling)
        self.on_device[slot].copy_(self._host[slot], non_blocking=True)

    def _write_past(self, slot: int, row: SamplerRow) -> None:
        """Set what concerns the tokens so far."""
        sampling, fields = row.sampling, self._table[slot]
        penalties = [
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        ]
        fields[[REPETITION, PRESENCE, FREQUENCY]] = np.array(penalties, np.float32).view(np.int32)
        fields[MIN_TOKENS] = sampling.min_tokens
        self.has_bans |= sampling.min_tokens > 0
        if self._tally is not None and has_penalty(sampling) and not self._is_slow[slot]:
            self._tally.start(slot, row)
            fields[IS_TALLIED] = 1
            self.has_penalties = True

    @property
    def has_slow(self) -> bool:
        """Whether some slot, in use or not, was last given parameters that the kernels cannot sample."""
        return bool(self._is_slow.any())

    def are_fast(self, slots: Any) -> bool:
        """Whether the kernels can sample all these slots."""
        return not self.has_slow or not self._is_slow[slots].any()

    def is_fast(self, slot: int, row: SamplerRow) -> bool:
        """Whether the kernels can sample this row in this slot."""
        if len(stop_ids_of(row)) > MAX_STOP_IDS:
            return False
        if not has_penalty(row.sampling):
            return True
        return self._tally is not None and self._tally.holds(slot, row)

    def tallied(self, slots: Any) -> Any:
        """Return which of these slots have a row in the tally, as a numpy array of bools."""
        return self._table[slots, IS_TALLIED] != 0


def stop_ids_of(row: SamplerRow) -> set[int]:
    """Return the tokens that end this row's sequence."""
    stop_ids = set(row.sampling.stop_token_ids)
    return stop_ids if row.sampling.ignore_eos else stop_ids | set(row.end_token_ids)
