"""Expectations: what the scheduler plans with before it is known. No torch here."""

from inference.block_manager import ROOT
from inference.sequence import Sequence

MAX_PLANNED_BLOCKS = 1_000_000
"""Blocks of submitted prompts that are remembered; then all are forgotten and remembered anew."""


class PlannedPrefixes:
    """Which prompt blocks have been submitted before: what the prefix cache should save, known in advance."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._nodes: dict[tuple[int, tuple[int, ...]], int] = {}

    def add(self, token_ids: list[int]) -> int:
        """Remember a prompt's full blocks; return how many of its tokens an earlier prompt begins with."""
        if len(self._nodes) > MAX_PLANNED_BLOCKS:
            self._nodes.clear()
        size, node, num_known = self._block_size, ROOT, 0
        for start in range(0, len(token_ids) - size, size):
            key = (node, tuple(token_ids[start : start + size]))
            known = self._nodes.get(key)
            if known is None:
                known = self._nodes[key] = len(self._nodes) + 1
            else:
                num_known = start + size
            node = known
        return num_known


class LengthEstimate:
    """Expected completion length: exact where end tokens are ignored, else learnt from what has finished."""

    def __init__(self, first_guess: int = 512) -> None:
        self._mean = float(first_guess)
        self._num_seen = 0

    def observe(self, num_tokens: int) -> None:
        """Take in the length of one finished completion."""
        self._num_seen += 1
        weight = max(1 / self._num_seen, 0.005)
        self._mean += (num_tokens - self._mean) * weight

    def of(self, sequence: Sequence) -> int:
        """Return the tokens to plan for; a quarter above the mean, never above max_tokens."""
        limit = sequence.sampling.max_tokens
        if sequence.sampling.ignore_eos:
            return limit
        return min(limit, int(self._mean * 1.25) + 16)
