"""Outlook: when a run under way will be done, from what its replicas have committed so far.

Everything is read from the store, so it is the same whoever asks and however many replicas there are.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from storage import keys
from storage.commits import CommitCache, current_commits
from storage.errors import NotFound
from storage.manifest import CommitRecord, PlanManifest, Shard, digest
from storage.object_store import ObjectStore
from tasks.deadline import deadline_at
from tasks.history import START_PHASES, num_generated_tokens
from tasks.job import RunConfig, job_of
from tasks.run_record import load_plan, load_shards, read_record

_Z90 = 1.2816
_PREFILL_WEIGHT = 1 / 8  # of a prompt token beside a generated one
_PRIOR_SPREAD = 0.5  # taken of a shard's time before a second shard tells


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A run's future as it looks at one moment; null where nothing is committed yet."""

    at: str
    num_shards_left: int
    num_replicas: int
    """That hold a shard now; 1 is taken where none does."""

    is_running: bool
    completion_tokens_per_s: float | None
    """Of all replicas at work now, from the shards they committed."""

    seconds_p50: float | None = None
    seconds_p90: float | None = None
    finish_p50: str | None = None
    finish_p90: str | None = None
    usd: float | None = None
    """Spent so far, by the receipts."""

    usd_p90: float | None = None
    """When it is done."""

    deadline: str | None = None
    budget_usd: float | None = None
    is_late: bool | None = None
    is_over_budget: bool | None = None
    warning: str | None = None
    """One line, as soon as P90 is past the deadline or over the budget."""

    def as_document(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


def read_outlook(
    store: ObjectStore,
    *,
    commits: Mapping[int, CommitRecord] | None = None,
    cache: CommitCache | None = None,
    now: datetime | None = None,
) -> Outlook | None:
    """Read a run's outlook; None before it is planned. `commits` or `cache` save reading them again.

    Raises:
        BadInput: the folder is not a run's.
    """
    now = now or datetime.now(UTC)
    record = read_record(store)
    plan = load_plan(store)
    if plan is None:
        return None
    if commits is None:
        commits = current_commits(store, digest(store.get(keys.PLAN)), cache=cache)
    return outlook(
        job_of(record),
        plan,
        load_shards(store, plan),
        commits,
        holders=holders_of(store, commits, now),
        started_at=datetime.fromisoformat(record.created_at),
        now=now,
    )


def outlook(
    job: RunConfig,
    plan: PlanManifest,
    shards: Sequence[Shard],
    commits: Mapping[int, CommitRecord],
    *,
    holders: Mapping[str, int],
    started_at: datetime,
    now: datetime,
) -> Outlook:
    """Forecast what is left.

    Args:
        job: The job, for its deadline and budget.
        plan: The plan.
        shards: The plan's shards.
        commits: What is committed, by shard.
        holders: Replicas at work now, with the number of shards each holds.
        started_at: When the run was made; its deadline is the first one after that.
        now: The present, with a time zone.
    """
    left = [shard for shard in shards if shard.shard_id not in commits]
    deadline = job.deadline and deadline_at(job.deadline, start=started_at, timezone=job.timezone)
    done = [c for c in commits.values() if c.tombstone is None and c.receipt.get("wall_s")]
    spent, replicas = _spent(done), max(1, len(holders))
    here = Outlook(
        at=now.isoformat(timespec="seconds"),
        num_shards_left=len(left),
        num_replicas=replicas,
        is_running=bool(holders),
        usd=None if spent is None else round(spent, 6),
        deadline=deadline.isoformat(timespec="seconds") if deadline else None,
        budget_usd=job.budget.usd,
        completion_tokens_per_s=_rate(done, replicas),
    )
    if not left:
        return dataclasses.replace(here, seconds_p50=0.0, seconds_p90=0.0)
    if not done:
        late = now > deadline if deadline else None
        warning = "the deadline has passed and nothing is committed" if late else None
        return dataclasses.replace(here, is_late=late, warning=warning)
    p50, p90 = _seconds_left(shards, left, done, holders, replicas, now)
    usd_p90 = None
    if spent is not None:
        a_second = spent / sum(c.receipt["wall_s"] for c in done)
        usd_p90 = spent + a_second * p90 * replicas
    return _ending(here, now, p50, p90, usd_p90, deadline or None)


def _spent(done: Sequence[CommitRecord]) -> float | None:
    """Dollars by the receipts; None before the first, or if one of them does not say."""
    prices = [c.receipt.get("usd") for c in done]
    return sum(p for p in prices if p is not None) if done and None not in prices else None


def _ending(
    here: Outlook,
    now: datetime,
    p50: float,
    p90: float,
    usd_p90: float | None,
    deadline: datetime | None,
) -> Outlook:
    """Return the outlook with its end: when, at what price, and whether that is too late or too much."""
    finish = [now + timedelta(seconds=s) for s in (p50, p90)]
    is_late = finish[1] > deadline if deadline else None
    budget = here.budget_usd
    is_over = usd_p90 > budget if budget is not None and usd_p90 is not None else None
    return dataclasses.replace(
        here,
        seconds_p50=round(p50, 1),
        seconds_p90=round(p90, 1),
        finish_p50=finish[0].isoformat(timespec="seconds"),
        finish_p90=finish[1].isoformat(timespec="seconds"),
        usd_p90=None if usd_p90 is None else round(usd_p90, 6),
        is_late=is_late,
        is_over_budget=is_over,
        warning=_warning(is_late, is_over, finish[1], deadline, usd_p90, budget),
    )


def _seconds_left(
    shards: Sequence[Shard],
    left: Sequence[Shard],
    done: Sequence[CommitRecord],
    holders: Mapping[str, int],
    replicas: int,
    now: datetime,
) -> tuple[float, float]:
    """Return P50 and P90: work left over the replicas, and how unlike the shards so far were."""
    sequences = sum(c.receipt.get("num_sequences") or 0 for c in done)
    mean_tokens = sum(num_generated_tokens(c.receipt) for c in done) / max(1, sequences)
    weight = {shard.shard_id: _weight(shard, mean_tokens) for shard in shards}
    # A replica's first shard carries its start; what is left will not pay for it again.
    per_weight = [(c.receipt["wall_s"] - _once(c)) / max(1.0, weight[c.shard_id]) for c in done]
    mean = sum(c.receipt["wall_s"] - _once(c) for c in done) / max(
        1.0, sum(weight[c.shard_id] for c in done)
    )
    spread = statistics.stdev(per_weight) if len(done) > 1 else _PRIOR_SPREAD * mean
    work = sum(weight[shard.shard_id] for shard in left)
    largest = max(weight[shard.shard_id] for shard in left)
    seconds = max(work * mean / replicas, 0.0)
    # Shards already begun have part of their time behind them.
    last = {
        c.holder: datetime.fromisoformat(c.committed_at)
        for c in sorted(done, key=lambda c: c.committed_at)
    }
    begun = sum(min((now - last[h]).total_seconds(), largest * mean) for h in holders if h in last)
    seconds = max(seconds - max(0.0, begun) / replicas, 0.25 * largest * mean)
    # The mean itself is uncertain, single shards scatter, and the last one keeps a replica alone.
    of_mean = spread / len(done) ** 0.5 * work / replicas
    of_shards = spread * (sum(weight[s.shard_id] ** 2 for s in left) ** 0.5) / replicas
    alone = largest * mean * (1 - 1 / replicas)
    return seconds, seconds + _Z90 * (of_mean**2 + of_shards**2) ** 0.5 + alone


def _weight(shard: Shard, mean_tokens: float) -> float:
    """What a shard's time is about proportional to: tokens generated, and prompt tokens for less."""
    return shard.num_prompt_tokens * _PREFILL_WEIGHT + (mean_tokens + 1) * (
        shard.num_rows - shard.num_bad_rows
    )


def _once(commit: CommitRecord) -> float:
    seconds = commit.receipt.get("seconds") or {}
    return float(sum(seconds.get(name, 0.0) for name in START_PHASES))


def _rate(done: Sequence[CommitRecord], replicas: int) -> float | None:
    wall = sum(c.receipt["wall_s"] for c in done)
    tokens = sum(num_generated_tokens(c.receipt) for c in done)
    return round(tokens / wall * replicas, 2) if wall > 0 else None


def _warning(
    is_late: bool | None,
    is_over: bool | None,
    finish: datetime,
    deadline: datetime | None,
    usd: float | None,
    budget: float | None,
) -> str | None:
    parts = []
    if is_late and deadline:
        parts.append(
            f"P90 finish {finish.isoformat(timespec='minutes')} is past the deadline "
            f"{deadline.isoformat(timespec='minutes')}; add replicas, or expect it late"
        )
    if is_over:
        parts.append(f"P90 cost ${usd:.2f} is over the budget of ${budget:.2f}")
    return "; ".join(parts) or None


def holders_of(
    store: ObjectStore, commits: Mapping[int, CommitRecord], now: datetime
) -> dict[str, int]:
    """Return replicas that hold an uncommitted shard, with how many; a hint, from their leases."""
    found: dict[str, int] = {}
    for info in store.list(keys.LEASES):
        name = info.key.removeprefix(keys.LEASES).removesuffix(".json")
        if not name.isdigit() or int(name) in commits:
            continue
        try:
            value = json.loads(store.get(info.key))
        except (NotFound, ValueError):
            continue
        # Clocks may differ by a little: twice its length is surely over.
        is_over = info.modified_at + 2 * float(value.get("ttl_s") or 90.0) < now.timestamp()
        if value.get("holder") and not is_over:
            found[value["holder"]] = found.get(value["holder"], 0) + 1
    return found
