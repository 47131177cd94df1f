"""Histograms of token counts: small enough for a receipt, fine enough to forecast from."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

_EXACT = 16
_PER_OCTAVE = 4


def bucket(num_tokens: int) -> int:
    """Return the upper bound of the bucket: exact up to 16, then four to each doubling."""
    if num_tokens <= _EXACT:
        return max(0, num_tokens)
    step = math.floor(_PER_OCTAVE * math.log2(num_tokens))
    while (bound := math.floor(2 ** (step / _PER_OCTAVE))) < num_tokens:
        step += 1
    return bound


def merged(histograms: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add histograms up, shortest bucket first."""
    total: Counter[str] = Counter()
    for histogram in histograms:
        total.update(histogram)
    return {bound: total[bound] for bound in sorted(total, key=int)}


def quantile(histogram: Mapping[str, int], share: float) -> int | None:
    """Return the bound below which `share` of the counts lie; None when there are none."""
    wanted, seen = share * sum(histogram.values()), 0
    for bound in sorted(histogram, key=int):
        seen += histogram[bound]
        if seen and seen >= wanted:
            return int(bound)
    return None
