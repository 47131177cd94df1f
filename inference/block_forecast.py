"""BlockForecast: how many KV blocks the running sequences will hold in the steps to come. No torch here.

A sequence grows a block at a time and gives all of them back at its end, so what may be admitted is not what is free
now, nor what everything would hold at its longest, but what leaves no step short. Ends that are known count as they
are; others with the share of completions that go on from their age (the idea: Gong et al., "Past-Future Scheduler for
LLM Serving under SLA Guarantees", 2025, there by sampling).

    R running sequences   W windows of steps
"""

from collections.abc import Sequence as Rows
from typing import Any

import numpy as np

from inference.expectations import LengthEstimate
from inference.steps import Running

NUM_WINDOWS = 128
"""Half of them a quarter of a block long, the others ever longer: what is far off need not be known as well."""

STEPS_PER_FORECAST = 16
"""After so many it is made anew from what has become of the sequences."""

JOIN_STEPS = 8
"""Steps that the prefill of a sequence may take before it ends later than is reckoned."""

DEVIATIONS = 1.0
"""Of the expected blocks, that are kept free beside them: ends that are not known come together at times."""

Array = np.ndarray[Any, np.dtype[np.float64]]


class BlockForecast:
    """Blocks held in each window of steps to come, the most within it."""

    def __init__(self, num_blocks: int, block_size: int, lengths: LengthEstimate) -> None:
        """`num_blocks`: that sequences may hold in all."""
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._lengths = lengths
        self._offsets = _offsets(max(1, block_size // 4))
        self._begins = self._ends = self._offsets[1:]  # steps where windows begin and end
        self._due = 0  # step from which on it is to be made anew
        self._held: Array = np.zeros(NUM_WINDOWS)
        self._variance: Array = np.zeros(NUM_WINDOWS)

    def expire(self) -> None:
        """Have it made anew before it is asked again: something was admitted without it."""
        self._due = 0

    def is_due(self, step: int) -> bool:
        """Whether it is to be made anew before it is asked."""
        return step >= self._due

    def renew(self, step: int, rows: Rows[Running], num_held: int, asked: Running) -> None:
        """Make it anew, before `step` is made and `asked` is asked for.

        `rows` are all that run, `num_held` the blocks that they hold together.
        """
        self._due = step + STEPS_PER_FORECAST
        self._begins, self._ends = step + self._offsets[:-1], step + self._offsets[1:]
        lasts = [_last_step(row, step) for row in rows]
        ages = np.array([_age(row, step) for row in rows], np.int64)
        is_known = np.array([row.sequence.sampling.ignore_eos for row in rows], bool)
        longest = max(int(ages.max(initial=0)), asked.num_sampled)
        num_tokens = max([*lasts, _last_step(asked, step)]) - step + longest
        self._lengths.renew(ages[~is_known], num_tokens)
        expected_RW = (self._begins <= np.array(lasts)[:, None]).astype(float)
        if not is_known.all():
            expected_RW[~is_known] *= self._survival(step, ages[~is_known])
        lengths = np.array([row.num_stored(step) for row in rows])[:, None]
        most = np.array([row.num_most_tokens for row in rows])[:, None]
        tables = np.array([len(row.block_table) for row in rows])[:, None]
        blocks_RW = np.maximum(self._blocks(step, lengths, most), tables)
        self._held = (expected_RW * blocks_RW).sum(0)
        self._variance = (expected_RW * (1 - expected_RW) * blocks_RW**2).sum(0)
        if rows:  # what many hold was counted for each; what few hold may soon be one's own
            num_shared = sum(row.num_shared_blocks for row in rows)
            num_shared = min(num_shared, int(tables.sum()) - num_held)
            self._held -= num_shared * expected_RW.sum(0) / len(rows)

    def admits(self, step: int, running: Running, num_shared: int, *, is_alone: bool) -> bool:
        """Whether blocks suffice with one more, of whose blocks others hold `num_shared`; if so it is counted.

        Alone it may always run.
        """
        blocks_W = self._blocks(step, len(running.token_ids), running.num_most_tokens) - num_shared
        expected_W = (self._begins <= _last_step(running, step)).astype(float)
        variance = self._variance
        if not running.sequence.sampling.ignore_eos:
            expected_W *= self._survival(step, np.array([running.num_sampled]))[0]
            variance = variance + expected_W * (1 - expected_W) * blocks_W**2
        held = self._held + expected_W * blocks_W
        to_come = self._ends > step
        most = (held + DEVIATIONS * np.sqrt(variance))[to_come].max()
        if most > self._num_blocks and not is_alone:
            return False
        self._held, self._variance = held, variance
        return True

    def _blocks(self, step: int, lengths: Any, most: Any) -> Any:
        """Return the most blocks [W] in each window, of sequences that have `lengths` tokens and come to `most`."""
        reached = np.minimum(lengths + np.maximum(self._ends - step, 0), most)
        return -(-reached // self._block_size)

    def _survival(self, step: int, ages: Any) -> Any:
        return self._lengths.survival(ages, np.maximum(self._begins - step, 0))


def _offsets(width: int) -> Any:
    """Return where windows begin, in steps from now, the first of them so long; and where the last one ends."""
    offsets = [0]
    for index in range(NUM_WINDOWS):
        offsets.append(offsets[-1] + width)
        if index >= NUM_WINDOWS // 2:
            width += -(-width // 10)
    return np.array(offsets)


def _age(running: Running, step: int) -> int:
    """Completion tokens sampled before `step`."""
    num_decoded = step - running.joined_at + 1 if running.row >= 0 else 0
    return running.num_sampled + num_decoded


def _last_step(running: Running, step: int) -> int:
    """The last step it may run in; prefill may take a while yet."""
    if running.row >= 0:
        return running.last_step
    return step + JOIN_STEPS + running.num_tokens_left - 1
