"""Request mixes, the same for every engine: random prompts, completions forced to their length.

    uniform    long completions: prompt and completion 100 to 1,024 tokens each
    chat       short turns with heavy tails: prompt about 120, completion about 150
    template   a data job: 512 instruction tokens shared by all rows, then a short row

The numbers drawn are those of the benchmarks that other engines were measured with, so that results compare.
"""

import math
import random
import time
from typing import Protocol

from inference.sequence import Completion, Sequence

MIXES = ("uniform", "chat", "template")

Request = tuple[list[int], int]
"""Prompt token ids, completion tokens."""


def requests(mix: str, count: int, *, vocab_size: int = 150_000, seed: int = 0) -> list[Request]:
    """Return `count` requests of a mix; the same for the same arguments."""
    generator = random.Random(seed)

    def token_ids(num_tokens: int) -> list[int]:
        return [generator.randrange(100, vocab_size) for _ in range(num_tokens)]

    def length(median: int, sigma: float, low: int, high: int) -> int:
        return max(low, min(high, round(math.exp(generator.gauss(math.log(median), sigma)))))

    if mix == "uniform":
        return [
            (token_ids(generator.randint(100, 1024)), generator.randint(100, 1024))
            for _ in range(count)
        ]
    if mix == "chat":
        return [
            (token_ids(length(120, 1.0, 8, 2048)), length(150, 0.8, 8, 1024)) for _ in range(count)
        ]
    if mix == "template":
        shared = token_ids(512)
        return [
            (shared + token_ids(length(160, 0.7, 16, 1536)), length(96, 0.7, 8, 512))
            for _ in range(count)
        ]
    raise ValueError(f"unknown mix {mix!r}; one of {', '.join(MIXES)}")


class Engine(Protocol):
    """What sequences can be run on: any backend, or the paged engine itself."""

    @property
    def num_unfinished(self) -> int:
        """Sequences submitted and not yet returned."""

    def submit(self, sequences: list[Sequence]) -> None:
        """Take sequences."""

    def step(self) -> list[Completion]:
        """Advance; return what finished."""


def run_to_ends(engine: Engine, sequences: list[Sequence]) -> float:
    """Run sequences whose completions have forced lengths; return the seconds it took.

    Raises:
        ValueError: a completion had another length than was asked for.
    """
    started_at = time.perf_counter()
    engine.submit(sequences)
    lengths = {}
    while engine.num_unfinished:
        for completion in engine.step():
            lengths[completion.seq_id] = len(completion.token_ids)
    elapsed_s = time.perf_counter() - started_at
    wrong = sum(lengths[s.seq_id] != s.sampling.max_tokens for s in sequences)
    if wrong:
        raise ValueError(
            f"{wrong} of {len(sequences)} completions have another length than asked for"
        )
    return elapsed_s
