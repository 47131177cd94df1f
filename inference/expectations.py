"""Expectations: what the scheduler plans with before it is known. No torch here."""

from typing import Any

import numpy as np

from inference.block_manager import ROOT
from inference.sequence import Sequence

MAX_PLANNED_BLOCKS = 1_000_000
"""Blocks of submitted prompts that are remembered; then all are forgotten and remembered anew."""

CURVE_TOKENS = 16
"""Completions are told apart by length in steps of so many tokens."""

GUESS_WEIGHT = 8
"""The first guess of lengths counts as much as so many completions."""

LEAST_SURVIVAL = 1e-200
"""Completions that are longer than all that is expected go on, as far as can be told."""


class PlannedPrefixes:
    """Which prompt blocks have been submitted before: what the prefix cache should save, known in advance."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._nodes: dict[int, int] = {}
        """By the hash of a block and its parent: a plan may be wrong once in a while, and tuples are 20 times as big."""

    def add(self, token_ids: list[int]) -> int:
        """Remember a prompt's full blocks; return how many of its tokens an earlier prompt begins with."""
        if len(self._nodes) > MAX_PLANNED_BLOCKS:
            self._nodes.clear()
        size, node, num_known = self._block_size, ROOT, 0
        for start in range(0, len(token_ids) - size, size):
            key = hash((node, *token_ids[start : start + size]))
            known = self._nodes.get(key)
            if known is None:
                known = self._nodes[key] = len(self._nodes) + 1
            else:
                num_known = start + size
            node = known
        return num_known


class LengthEstimate:
    """Completion lengths: exact where end tokens are ignored, else learnt from what has finished.

    Ranks reckon alike on any processor: sums, products and quotients only, in one order.
    """

    def __init__(self, first_guess: int = 512) -> None:
        self._mean = float(first_guess)
        self._num_seen = 0
        self._guessed_rate = min(0.5, CURVE_TOKENS / first_guess)
        self._num_ended: Any = np.zeros(1)
        self._num_reached: Any = np.zeros(1)
        self._survival: Any = np.ones(2)

    def observe(self, num_tokens: int, *, has_ended: bool = True) -> None:
        """Take in the length of one finished completion; `has_ended`: by itself, not at its limit."""
        self._num_seen += 1
        weight = max(1 / self._num_seen, 0.005)
        self._mean += (num_tokens - self._mean) * weight
        place = num_tokens // CURVE_TOKENS
        if place >= len(self._num_ended):
            self._num_ended = _longer(self._num_ended, 2 * place + 1)
            self._num_reached = _longer(self._num_reached, 2 * place + 1)
        self._num_ended[place] += has_ended
        self._num_reached[: place + 1] += 1

    def of(self, sequence: Sequence) -> int:
        """Return the tokens to plan for; a quarter above the mean, never above max_tokens."""
        limit = sequence.sampling.max_tokens
        if sequence.sampling.ignore_eos:
            return limit
        return min(limit, int(self._mean * 1.25) + 16)

    def renew(self, ages: Any, num_tokens: int) -> None:
        """Reckon anew how many completions reach each length up to `num_tokens`.

        Of those that reach a length, the share that ends there (Kaplan and Meier, 1958). Those that run, with
        `ages` tokens [R], count as far as they have come: of what has finished, the short ones are too many.
        """
        size = max(num_tokens // CURVE_TOKENS + 1, len(self._num_ended))
        running = np.bincount(np.minimum(ages // CURVE_TOKENS, size - 1), minlength=size)
        reached = _longer(self._num_reached, size) + running[::-1].cumsum()[::-1]
        ended = _longer(self._num_ended, size) + GUESS_WEIGHT * self._guessed_rate
        goes_on = 1 - ended / (reached + GUESS_WEIGHT)
        self._survival = np.maximum(np.append(1.0, goes_on.cumprod()), LEAST_SURVIVAL)

    def survival(self, ages: Any, more: Any) -> Any:
        """Return the shares [R,M] of completions of so many tokens [R] that go on for so many more [M]."""
        return self._reaching(ages[:, None] + more) / self._reaching(ages)[:, None]

    def _reaching(self, num_tokens: Any) -> Any:
        places = np.minimum(num_tokens // CURVE_TOKENS, len(self._survival) - 2)
        begin, end = self._survival[places], self._survival[places + 1]
        within = np.minimum(num_tokens / CURVE_TOKENS - places, 1)
        return begin + (end - begin) * within


def _longer(counts: Any, size: int) -> Any:
    return np.append(counts, np.zeros(max(0, size - len(counts))))
