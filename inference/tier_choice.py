"""Which of the tiers that fit is the best, and the sentence that says why."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from inference.hardware import GB
from inference.tier import QUANTIZATIONS, Tier

Objective = Literal["cheapest", "fastest"]
# GPUs of as much memory in all, give or take a tenth, are as small as each other: fewer of them are better.
ABOUT = 1.1

_Measure = Literal["seconds", "dollars", "hours", "rate", "size", "count"]

_RANKS: dict[_Measure, Callable[[Tier], tuple[float, ...]]] = {
    "seconds": lambda tier: (
        tier.seconds or 0.0,
        (tier.gpu_hours or 0.0) if tier.usd is None else tier.usd,
        tier.num_gpus,
    ),
    "dollars": lambda tier: (tier.usd or 0.0, tier.seconds or 0.0, tier.num_gpus),
    "hours": lambda tier: (tier.gpu_hours or 0.0, tier.seconds or 0.0, tier.num_gpus),
    "size": lambda tier: (tier.num_gpus, tier.memory_bytes, tier.seconds or 0.0),
    "rate": lambda tier: (tier.usd_per_hour or 0.0, tier.num_gpus),
    "count": lambda tier: (-tier.num_gpus, tier.tensor_parallel_size),
}


def best_of(
    tiers: Sequence[Tier], deadline_s: float | None, budget_usd: float | None, objective: Objective
) -> Tier:
    """The best of tiers that fit, with its reason; `inference.tiers.choose_tier` says how it is found."""
    pool = [tier for tier in tiers if tier.offload == "none"] or list(tiers)
    # Once any price is known, a tier without one cannot be compared: it is listed, not chosen.
    pool = [tier for tier in pool if tier.usd_per_hour is not None] or pool
    predicted = [tier for tier in pool if tier.seconds is not None]
    pool = predicted or pool
    in_time = [
        t for t in pool if deadline_s is None or t.seconds is None or t.seconds <= deadline_s
    ]
    late = not in_time
    if late:
        objective = "fastest"
    allowed = in_time or pool
    within = [t for t in allowed if budget_usd is None or t.usd is None or t.usd <= budget_usd]
    allowed = within or allowed
    least = min(QUANTIZATIONS.index(tier.quantization) for tier in allowed)
    allowed = [t for t in allowed if QUANTIZATIONS.index(t.quantization) == least]
    by = _measure(allowed, objective)
    if by in ("rate", "size"):
        allowed = [tier for tier in allowed if tier.has_kv_room] or allowed
    best = min(_smallest(allowed) if by == "size" else allowed, key=_RANKS[by])
    return replace(best, reason=_reason(best, len(tiers), deadline_s, late, by))


def _measure(tiers: Sequence[Tier], objective: Objective) -> _Measure:
    """By what these tiers are compared, all of which have a price and a prediction, or none has."""
    if tiers[0].seconds is None:
        if objective == "fastest":
            return "count"
        return "size" if tiers[0].usd_per_hour is None else "rate"
    if objective == "fastest":
        return "seconds"
    if tiers[0].usd is not None:
        return "dollars"
    return "hours" if len({tier.gpu for tier in tiers}) == 1 else "size"


def _smallest(tiers: Sequence[Tier]) -> list[Tier]:
    """Those with about the least memory."""
    least = min(tier.memory_bytes for tier in tiers)
    return [tier for tier in tiers if tier.memory_bytes <= ABOUT * least]


def _reason(
    tier: Tier, num_fitting: int, deadline_s: float | None, late: bool, by: _Measure
) -> str:
    why = {
        "seconds": "the fastest",
        "dollars": f"the cheapest (${tier.usd or 0.0:.2f})",
        "hours": f"the fewest GPU-hours ({tier.gpu_hours or 0.0:.2f}; no prices are given)",
        "rate": f"the cheapest an hour (${tier.usd_per_hour or 0.0:.2f}) {_room(tier)}",
        "size": f"the smallest GPUs {_room(tier)}",
        "count": "every GPU there is",
    }[by]
    if by == "size" and tier.seconds is not None:
        why += " (no prices are given; with price_per_hour in a hardware file, the cheapest)"
    if late and tier.seconds is not None and deadline_s is not None:
        late_h = (tier.seconds - deadline_s) / 3600
        why = f"nothing meets the deadline, and this is the fastest, {late_h:.2f} h late"
    elif deadline_s is not None and tier.seconds is not None:
        why += f" that meets the deadline of {deadline_s / 3600:.2f} h"
    weights = f"{tier.weight_bytes_per_gpu / GB:.1f} GB of weights a GPU leave room for {tier.kv_tokens:,} KV tokens"
    if tier.offload != "none":
        weights = f"the weights stay on {tier.offload}"
    hours = tier.notes[0] if tier.seconds is None else f"{tier.seconds / 3600:.2f} h predicted"
    options = f"of {num_fitting} that fit" if num_fitting > 1 else "that fits"
    return f"{tier.label}: {weights}; {hours}, {why}, {options}"


def _room(tier: Tier) -> str:
    return "whose KV cache outweighs the weights" if tier.has_kv_room else "that hold it"
