"""BlockForecast: how many KV blocks the running sequences will hold in the steps to come. Parts of admission; no torch.

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

MIN_WINDOW_STEPS = 8

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
        self._begin = 0  # step where the first window begins
        self._due = 0  # step from which on it is to be made anew
        self._window_steps = MIN_WINDOW_STEPS
        self._held: Array = np.zeros(NUM_WINDOWS)
        self._variance: Array = np.zeros(NUM_WINDOWS)

    def is_due(self, step: int, running: Running) -> bool:
        """Whether it is to be made anew, before it is asked whether it admits this one."""
        end = self._begin + NUM_WINDOWS * self._window_steps
        return step >= self._due or _last_step(running, step) >= end

    def renew(self, step: int, rows: Rows[Running], num_held: int, asked: Running) -> None:
        """Make it anew, before `step` is made, as far as `asked` may come.

        `rows` are all that run, `num_held` the blocks that they hold together.
        """
        self._begin, self._due = step, step + STEPS_PER_FORECAST
        last = np.array([_last_step(row, step) for row in rows], np.int64)
        num_steps = max(last.max(initial=0), _last_step(asked, step)) + STEPS_PER_FORECAST - step
        self._window_steps = max(MIN_WINDOW_STEPS, -(-int(num_steps) // NUM_WINDOWS))
        ages = [_age(row, step) for row in rows if not row.sequence.sampling.ignore_eos]
        num_tokens = max([_age(asked, step), *ages]) + NUM_WINDOWS * self._window_steps
        self._lengths.renew(np.array(ages, np.int64), num_tokens)
        expected_RW, blocks_RW = self._profiles(step, rows, last)
        self._held = (expected_RW * blocks_RW).sum(0)
        self._variance = (expected_RW * (1 - expected_RW) * blocks_RW**2).sum(0)
        if rows:  # blocks that several hold were counted for each
            num_shared = sum(len(row.block_table) for row in rows) - num_held
            self._held -= num_shared * expected_RW.sum(0) / len(rows)

    def admits(self, step: int, running: Running, num_shared: int, *, is_alone: bool) -> bool:
        """Whether blocks suffice with one more, of whose blocks others hold `num_shared`; if so it is counted.

        Alone it may always run.
        """
        last = np.array([_last_step(running, step)], np.int64)
        expected_RW, blocks_RW = self._profiles(step, [running], last)
        expected_W, blocks_W = expected_RW[0], np.maximum(blocks_RW[0] - num_shared, 0)
        held = self._held + expected_W * blocks_W
        variance = self._variance + expected_W * (1 - expected_W) * blocks_W**2
        now = (step - self._begin) // self._window_steps
        most = (held + DEVIATIONS * np.sqrt(variance))[now:].max()
        if most > self._num_blocks and not is_alone:
            return False
        self._held, self._variance = held, variance
        return True

    def _profiles(self, step: int, rows: Rows[Running], last: Any) -> tuple[Array, Array]:
        """Return for each sequence and window how likely it still runs, and the most blocks it then holds."""
        begins = self._begin + self._window_steps * np.arange(NUM_WINDOWS)
        ahead = begins + self._window_steps - step  # steps until the window's end
        length = np.array([_length(row, step) for row in rows], np.int64)[:, None]
        most = np.array([len(row.token_ids) + row.num_tokens_left - 1 for row in rows], np.int64)
        table = np.array([len(row.block_table) for row in rows], np.int64)[:, None]
        reached = np.minimum(length + np.maximum(ahead, 0), most[:, None])
        blocks = np.maximum(-(-reached // self._block_size), table)
        expected = (begins <= last[:, None]).astype(float)
        unknown = [i for i, row in enumerate(rows) if not row.sequence.sampling.ignore_eos]
        if unknown:
            ages = np.array([_age(rows[i], step) for i in unknown], np.int64)
            expected[unknown] *= self._lengths.survival(ages, np.maximum(begins - step, 0))
        return expected, blocks.astype(float)


def _age(running: Running, step: int) -> int:
    """Completion tokens sampled before `step`."""
    return running.num_sampled + _num_decoded(running, step)


def _length(running: Running, step: int) -> int:
    """Tokens whose keys are stored before `step`, once prefill is through."""
    return len(running.token_ids) + max(0, _num_decoded(running, step) - 1)


def _num_decoded(running: Running, step: int) -> int:
    return step - running.joined_at + 1 if running.row >= 0 else 0


def _last_step(running: Running, step: int) -> int:
    """The last step it may run in; prefill may take a while yet."""
    if running.row >= 0:
        return running.last_step
    return step + JOIN_STEPS + running.num_tokens_left - 1
