"""EvenLoad: how many tokens a step computes; Waiting: who starts next. Parts of the scheduler's policy, without torch.

A decode step of few rows costs almost as much as one of a few hundred, so the work that is left is spread over the
steps that the longest completion needs anyway: cheaper than a crowd and then a tail.
"""

from collections.abc import Callable
from itertools import accumulate

from inference.steps import Running

DUE_PLACES = 64
"""Places in the queue of waiting sequences where the prefill that is due is looked at."""


class Waiting:
    """Sequences without a slot, longest completion first; rows of one prefix stay together where lengths tie."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._running: list[Running] = []  # the next one last
        self._sums: list[int] = []  # prefill tokens of the first i + 1, shared prefixes not counted
        self._is_sorted = True

    def __len__(self) -> int:
        return len(self._running)

    def add(self, running: Running) -> None:
        """Take one in, to wait for its turn."""
        self._running.append(running)
        self._is_sorted = False

    def push(self, running: Running) -> None:
        """Take one back, to be the next."""
        self._running.append(running)
        del self._sums[len(self._running) - 1 :]
        before = self._sums[-1] if self._sums else 0
        self._sums.append(before + len(running.token_ids))

    def next(self) -> Running:
        """Return the one whose turn it is. Raises IndexError when none waits."""
        return self._running[-1]

    @property
    def num_prefill_tokens(self) -> int:
        """Of all, once sorted; shared prefixes not counted."""
        return self._sums[-1] if self._running else 0

    def pop(self) -> Running:
        """Take out the one whose turn it is. Raises IndexError when none waits."""
        return self._running.pop()

    def sort(self) -> None:
        """Bring those that were added into their order."""
        if self._is_sorted:
            return
        self._running.sort(
            key=lambda running: (
                running.num_expected_tokens - running.num_sampled,
                running.token_ids[: self._block_size],
            )
        )
        lengths = (len(r.token_ids) - r.num_planned_cached for r in self._running)
        self._sums = list(accumulate(lengths))
        self._is_sorted = True

    def prefill_due(self, num_steps: int, num_begun_tokens: int) -> int:
        """Prefill tokens a step that let every sequence start in time to end with the longest, looked at in a few places.

        `num_begun_tokens` are still to be prefilled of sequences that have begun.
        """
        if not self._running:
            return 0
        whole = num_begun_tokens + self._sums[len(self._running) - 1]
        due = 0.0
        for index in range(len(self._running) - 1, -1, -max(1, len(self._running) // DUE_PLACES)):
            before = self._sums[index - 1] if index else 0
            steps = num_steps - self._running[index].num_expected_tokens
            due = max(due, (whole - before) / max(1, steps))
        return int(due)


class EvenLoad:
    """What is left to compute, and the share of it that the next step takes."""

    def __init__(
        self, min_step_tokens: int, sizes_around: Callable[[int], tuple[int, int]] | None
    ) -> None:
        """`sizes_around` gives the sizes next to a number of tokens that steps are computed at; None: every size."""
        self._min_step_tokens = min_step_tokens
        self._sizes_around = sizes_around or (lambda num_tokens: (num_tokens, num_tokens))
        self._num_owed_tokens = 0  # while steps were computed at the size below the even load
        self.num_work_tokens = 0
        """Expected tokens of everything submitted and not yet computed."""

        self.last_finish = 0
        """Step in which the last one that runs is expected to end."""

    def target(self, step: int, num_decodes: int, waiting: Waiting, num_begun_tokens: int) -> int:
        """Tokens for this step: its even load, in a size that steps are computed at while there is prefill."""
        target = self.share(step, num_decodes, waiting, num_begun_tokens)
        if waiting or num_begun_tokens:
            target = max(self._full_size(target), self._sizes_around(max(1, num_decodes))[1])
        return target

    def share(self, step: int, num_decodes: int, waiting: Waiting, num_begun_tokens: int) -> int:
        """Return this step's share of what is left, over the steps that the longest completion needs anyway.

        More if a waiting sequence would otherwise start too late to end with the longest one.
        """
        waiting.sort()
        num_steps = max(1, self.last_finish - step + 1)
        if waiting:
            num_steps = max(num_steps, waiting.next().num_expected_tokens)
        even = -(-self.num_work_tokens // num_steps)
        due = num_decodes + waiting.prefill_due(num_steps, num_begun_tokens)
        return max(even, due, self._min_step_tokens, num_decodes)

    def _full_size(self, target: int) -> int:
        """Return the size below or above a target, such that over many steps it is met on average.

        Always taking the size above would prefill sooner, and leave steps of few rows at the end.
        """
        below, above = self._sizes_around(target)
        self._num_owed_tokens += target
        size = above if self._num_owed_tokens >= above else below
        self._num_owed_tokens = min(max(self._num_owed_tokens - size, 0), above)
        return size
