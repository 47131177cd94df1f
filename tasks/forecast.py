"""Forecast: when a run will be done and what it will cost, with what that rests on.

Lengths come from earlier runs, else from a canary, else max_tokens bounds them. Speed comes from
earlier runs on such a device, else from the roofline of the tier, else nothing is known of it.
"""

import dataclasses
import statistics
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from tasks.history import START_PHASES, History, PastRun
from tasks.lengths import quantile

Basis = Literal["history", "canary", "max_tokens"]

_SPREAD_ONE_RUN = 0.25  # of the speed, when only one earlier run tells
_SPREAD_LEAST = 0.10
_SPREAD_ROOFLINE = 0.30
_HALF_OF_BOUND = 0.5  # what is assumed of max_tokens when nothing else is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long completions are taken to be."""

    basis: Basis
    mean: float
    high: float
    """Mean that is exceeded once in ten; with `max_tokens`, the bound itself."""

    p50: int | None = None
    p90: int | None = None
    sentence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What there is to generate."""

    num_sequences: int
    num_prefill_tokens: float
    """Prompt tokens of all sequences without what is taken from the prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What one replica needs."""

    basis: Literal["history", "roofline"]
    start_s: float
    """Once for each replica: stage, load, warm-up, and until the first rows came."""

    tail_s: float
    """Once for each replica: while its last sequences end and the batch runs empty."""

    tail_tokens: float
    """Completion tokens that a tail is good for."""

    prefill_s_per_token: float
    decode_s_per_token: float
    other_s_per_sequence: float
    spread: float
    """P90 over P50, less one, of the speed alone."""

    sentence: str = ""

    def seconds(self, work: Work, mean_tokens: float, replicas: int) -> float:
        """Return the wall seconds `replicas` need."""
        replicas = max(1, replicas)
        num_tokens = work.num_sequences * mean_tokens
        in_tails = min(num_tokens, self.tail_tokens * replicas)
        spent = work.num_prefill_tokens * self.prefill_s_per_token
        spent += (num_tokens - in_tails) * self.decode_s_per_token
        spent += work.num_sequences * self.other_s_per_sequence
        # The tail is as long as the longest completion, however many there are before it.
        tail_s = self.tail_s * in_tails / (self.tail_tokens * replicas) if in_tails else self.tail_s
        return self.start_s + tail_s + spent / replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Seconds are wall seconds from `starts_at`; null where nothing is known of the speed."""

    starts_at: str
    lengths: Lengths
    speed_basis: Literal["history", "roofline"] | None
    replicas: int
    num_completion_tokens_p50: int
    num_completion_tokens_p90: int
    seconds_p50: float | None = None
    seconds_p90: float | None = None
    finish_p50: str | None = None
    finish_p90: str | None = None
    gpu_hours_p50: float | None = None
    gpu_hours_p90: float | None = None
    usd_p50: float | None = None
    usd_p90: float | None = None
    deadline: str | None = None
    budget_usd: float | None = None
    is_late: bool | None = None
    """P90 is past the deadline; null when one of them is not known."""

    is_over_budget: bool | None = None
    """P90 costs more than the budget; null when one of them is not known."""

    sentence: str = ""


def lengths_of(history: History, max_tokens: int) -> Lengths:
    """Return what is known of completion lengths; lacking everything, max_tokens as a bound."""
    past = history.last
    if past is None:
        return Lengths(
            basis="max_tokens",
            mean=max_tokens * _HALF_OF_BOUND,
            high=float(max_tokens),
            sentence=f"lengths: no earlier run; half of max_tokens ({max_tokens}) is assumed, P90 takes all of it",
        )
    means = [run.mean_completion_tokens for run in history.runs if run.num_rows]
    mean = min(past.mean_completion_tokens, float(max_tokens))
    spread = statistics.stdev(means) if len(means) > 1 else 0.1 * mean
    return Lengths(
        basis="history",
        mean=mean,
        high=min(mean + 1.28 * spread, float(max_tokens)),
        p50=quantile(history.lengths, 0.5),
        p90=quantile(history.lengths, 0.9),
        sentence=f"lengths: {mean:.0f} tokens on average in the last of {len(means)} earlier runs",
    )


def lengths_of_canary(num_sequences: int, num_tokens: int, max_tokens: int) -> Lengths:
    """Return what a canary of so many sequences says."""
    mean = num_tokens / max(1, num_sequences)
    return Lengths(
        basis="canary",
        mean=mean,
        high=min(float(max_tokens), mean * (1 + 1.28 / max(1, num_sequences) ** 0.5)),
        sentence=f"lengths: {mean:.0f} tokens on average in a canary of {num_sequences} rows",
    )


def speed_of(past: PastRun, history: History | None = None, *, has_canary: bool = True) -> Speed:
    """Return the speed of an earlier run; how far it can be trusted, the others like it tell.

    With `has_canary` the new run begins with a canary if the earlier one did.
    """
    seconds = dict(past.replica_seconds)
    if not has_canary:
        seconds.pop("canary", None)
    started = sum(seconds.get(name, 0.0) for name in START_PHASES)
    known = {*START_PHASES, "tail", "prefill", "decode"}
    other = sum(value for name, value in seconds.items() if name not in known)
    tail_s, decode_s = seconds.get("tail", 0.0), seconds.get("decode", 0.0)
    num_full = past.num_completion_tokens - past.num_tail_tokens
    if num_full <= 0 or decode_s <= 0:  # it was all tail
        num_full, decode_s = past.num_completion_tokens, decode_s + tail_s
    return Speed(
        basis="history",
        start_s=started / past.num_replicas,
        tail_s=tail_s / past.num_replicas,
        tail_tokens=past.num_tail_tokens / past.num_replicas,
        prefill_s_per_token=seconds.get("prefill", 0.0) / max(1, past.num_prompt_tokens),
        decode_s_per_token=decode_s / max(1, num_full),
        other_s_per_sequence=other / max(1, past.num_rows),
        spread=_spread(past, history or History()),
        sentence=f"speed: as in run {past.run_id} on {past.device}",
    )


def _spread(past: PastRun, history: History) -> float:
    """Return how much slower one run in ten is, as a share: by the scatter of runs on such a device."""
    speeds = [
        sum(run.replica_seconds.get(name, 0.0) for name in ("decode", "tail")) / tokens
        for run in history.runs
        if (run.backend, run.device) == (past.backend, past.device)
        and (tokens := run.num_completion_tokens)
    ]
    if len(speeds) < 2 or not statistics.fmean(speeds):
        return _SPREAD_ONE_RUN
    return max(_SPREAD_LEAST, 1.28 * statistics.stdev(speeds) / statistics.fmean(speeds))


def forecast(
    *,
    work: Work,
    lengths: Lengths,
    speed: Speed | None,
    tier_seconds: tuple[float, float] | None,
    starts_at: datetime,
    plan_s: float = 0.0,
    replicas: int = 1,
    gpus_per_replica: int = 1,
    price_per_hour: float | None = None,
    deadline: datetime | None = None,
    budget_usd: float | None = None,
) -> Forecast:
    """Forecast a run that starts now.

    Args:
        work: What there is to generate.
        lengths: How long completions are taken to be.
        speed: Of one replica, from an earlier run; it wins over `tier_seconds`.
        tier_seconds: Wall seconds the roofline says for mean and high lengths.
        starts_at: When planning begins, with a time zone.
        plan_s: Seconds the run plans before its first replica starts.
        replicas: Engines at work.
        gpus_per_replica: GPUs, or 1 on a machine without.
        price_per_hour: US dollars for one of them.
        deadline: With a time zone.
        budget_usd: What the run may cost.
    """
    basis, p50, p90 = _seconds(work, lengths, speed, tier_seconds, plan_s, replicas)
    finish = [None if s is None else starts_at + timedelta(seconds=s) for s in (p50, p90)]
    hours = [
        None if s is None else (s - plan_s) * replicas * gpus_per_replica / 3600 for s in (p50, p90)
    ]
    usd = [None if h is None or price_per_hour is None else h * price_per_hour for h in hours]
    made = Forecast(
        starts_at=_iso(starts_at),
        lengths=lengths,
        speed_basis=basis,
        replicas=replicas,
        num_completion_tokens_p50=round(work.num_sequences * lengths.mean),
        num_completion_tokens_p90=round(work.num_sequences * lengths.high),
        seconds_p50=_rounded(p50, 3),
        seconds_p90=_rounded(p90, 3),
        finish_p50=None if finish[0] is None else _iso(finish[0]),
        finish_p90=None if finish[1] is None else _iso(finish[1]),
        gpu_hours_p50=_rounded(hours[0], 4),
        gpu_hours_p90=_rounded(hours[1], 4),
        usd_p50=_rounded(usd[0], 4),
        usd_p90=_rounded(usd[1], 4),
        deadline=None if deadline is None else _iso(deadline),
        budget_usd=budget_usd,
        is_late=None if deadline is None or finish[1] is None else finish[1] > deadline,
        is_over_budget=None if budget_usd is None or usd[1] is None else usd[1] > budget_usd,
    )
    return dataclasses.replace(made, sentence=_sentence(made, speed))


def _seconds(
    work: Work,
    lengths: Lengths,
    speed: Speed | None,
    tier_seconds: tuple[float, float] | None,
    plan_s: float,
    replicas: int,
) -> tuple[Literal["history", "roofline"] | None, float | None, float | None]:
    """Return what the speed rests on and the wall seconds with planning, P50 and P90; None if not known."""
    if work.num_sequences == 0:
        return None, plan_s, plan_s
    if speed is not None:
        p50 = plan_s + speed.seconds(work, lengths.mean, replicas)
        p90 = plan_s + speed.seconds(work, lengths.high, replicas) * (1 + speed.spread)
        return speed.basis, p50, p90
    if tier_seconds is not None:
        mean, high = tier_seconds
        return "roofline", plan_s + mean, plan_s + high * (1 + _SPREAD_ROOFLINE)
    return None, None, None


def _sentence(made: Forecast, speed: Speed | None) -> str:
    parts = []
    if made.seconds_p50 is None:
        parts.append(
            "finish: not known, no earlier run on such a device and nothing to reckon its speed with"
        )
    else:
        parts.append(f"finish: even odds by {made.finish_p50}, nine in ten by {made.finish_p90}")
    if made.is_late is not None:
        verdict = "misses" if made.is_late else "meets"
        parts.append(f"P90 {verdict} the deadline {made.deadline}")
    if made.usd_p50 is not None:
        parts.append(f"cost: ${made.usd_p50:.2f} to ${made.usd_p90:.2f}")
    if made.is_over_budget is not None:
        verdict = "is over" if made.is_over_budget else "is within"
        parts.append(f"P90 {verdict} the budget of ${made.budget_usd:.2f}")
    parts.append(made.lengths.sentence)
    if speed is not None:
        parts.append(speed.sentence)
    elif made.speed_basis == "roofline":
        parts.append("speed: from the GPU's data sheet, no earlier run")
    return "; ".join(parts)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
