"""Workload: the token counts of a run, grouped into classes of equal sequences."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SequenceClass:
    """`count` sequences of one prompt and one completion length, in tokens."""

    count: float
    num_prompt_tokens: float
    num_completion_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The token counts of a run, as far as its speed depends on them."""

    classes: tuple[SequenceClass, ...]
    """Sorted by completion length, shortest first."""

    max_sequence_tokens: int
    """Longest prompt plus completion any row may need."""

    num_reused_prompt_tokens: float = 0.0
    """Prompt tokens that need no prefill because an earlier row shares the prefix."""

    @classmethod
    def of(
        cls,
        lengths: Iterable[tuple[int, int]],
        *,
        num_classes: int = 32,
        num_reused_prompt_tokens: float = 0.0,
    ) -> "Workload":
        """Group (prompt, completion) lengths into at most `num_classes` classes of equal size."""
        rows = sorted(lengths, key=lambda row: (row[1], row[0]))
        if not rows:
            raise ValueError("a workload needs at least one sequence")
        num_classes = min(num_classes, len(rows))
        bounds = [round(i * len(rows) / num_classes) for i in range(num_classes + 1)]
        groups = [rows[a:b] for a, b in itertools.pairwise(bounds)]
        classes = tuple(
            SequenceClass(
                len(group),
                sum(row[0] for row in group) / len(group),
                sum(row[1] for row in group) / len(group),
            )
            for group in groups
        )
        # The longest completion ends the run; a mean would hide it.
        longest = classes[-1]
        if longest.count > 1:
            classes = (
                *classes[:-1],
                SequenceClass(
                    longest.count - 1,
                    longest.num_prompt_tokens,
                    (longest.num_completion_tokens * longest.count - rows[-1][1])
                    / (longest.count - 1),
                ),
                SequenceClass(1, longest.num_prompt_tokens, rows[-1][1]),
            )
        return cls(
            classes=classes,
            max_sequence_tokens=max(sum(row) for row in rows),
            num_reused_prompt_tokens=num_reused_prompt_tokens,
        )

    @classmethod
    def from_totals(
        cls,
        num_sequences: int,
        num_prompt_tokens: int,
        num_completion_tokens: int,
        *,
        max_completion_tokens: int | None = None,
        num_reused_prompt_tokens: float = 0.0,
    ) -> "Workload":
        """A workload of which only totals are known: completion lengths are taken as log-normal.

        `max_completion_tokens` is the run's max_tokens, where long completions are cut.
        """
        if num_sequences < 1:
            raise ValueError(f"num_sequences must be at least 1, got {num_sequences}")
        prompt = num_prompt_tokens / num_sequences
        mean = num_completion_tokens / num_sequences
        limit = max(max_completion_tokens or 8 * mean, mean)
        lengths = _cut_log_normal(mean, limit)
        classes = tuple(
            SequenceClass(num_sequences / len(lengths), prompt, length) for length in lengths
        )
        return cls(
            classes=classes,
            max_sequence_tokens=math.ceil(prompt + limit),
            num_reused_prompt_tokens=num_reused_prompt_tokens,
        )

    @property
    def num_sequences(self) -> float:
        """Sequences in all."""
        return sum(c.count for c in self.classes)

    @property
    def num_prompt_tokens(self) -> float:
        """Prompt tokens in all, reused ones included."""
        return sum(c.count * c.num_prompt_tokens for c in self.classes)

    @property
    def num_completion_tokens(self) -> float:
        """Completion tokens in all."""
        return sum(c.count * c.num_completion_tokens for c in self.classes)

    def share(self, replicas: int) -> "Workload":
        """What one of `replicas` equal replicas gets of it."""
        return Workload(
            classes=tuple(
                SequenceClass(c.count / replicas, c.num_prompt_tokens, c.num_completion_tokens)
                for c in self.classes
            ),
            max_sequence_tokens=self.max_sequence_tokens,
            num_reused_prompt_tokens=self.num_reused_prompt_tokens / replicas,
        )


def _cut_log_normal(mean: float, limit: float) -> list[float]:
    """Means of eight equal slices of a log-normal (sigma 0.8) cut at `limit`, whose mean is `mean`."""
    slices = (0.19, 0.33, 0.46, 0.61, 0.81, 1.09, 1.55, 2.96)
    low, high = mean, max(limit, mean) / slices[0]
    for _ in range(60):
        scale = (low + high) / 2
        if sum(min(limit, scale * part) for part in slices) < mean * len(slices):
            low = scale
        else:
            high = scale
    return [min(limit, high * part) for part in slices]
