"""Request mixes, the same for every engine: random prompts, completions forced to their length.

    uniform    long completions: prompt and completion 100 to 1,024 tokens each
    chat       short turns with heavy tails: prompt about 120, completion about 150
    template   a data job: 512 instruction tokens shared by all rows, then a short row

The numbers drawn are those of the benchmarks that other engines were measured with, so that results compare.
"""

import math
import random

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
