"""Waves of replicas, decided by the store alone.

    look at commits, attempts and leases -> how many replicas are missing -> launch -> wait -> look again

Whoever provides replicas (`Fleet`) is asked only how many may still be alive. A replica that vanished,
a lost server and a state that lies cost time, never rows. Attempts are bounded per shard within one
start, and waves that commit nothing are bounded, too.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from storage import keys
from storage.attempts import attempts_of
from storage.lease import Leases
from storage.manifest import CommitRecord
from tasks.budget import BudgetGate, BudgetSpent
from tasks.cancel import is_cancelled
from tasks.holder import holder_name, is_dead
from tasks.run import Run
from tasks.stop import Stopped, StopSignal

log = logging.getLogger("nightjar.waves")

MAX_IDLE_WAVES = 3
_SILENT_S = 1800.0


class Fleet(Protocol):
    """Provides replicas of one start."""

    def launch(self, wave: int, count: int) -> None:
        """Ask for `count` more replicas; the same wave asked for twice is asked for once."""

    def num_live(self) -> int:
        """How many of those asked for may still work or start to."""

    def num_running(self) -> int:
        """How many of those are known to have started."""

    def last_words(self) -> str | None:
        """What the replica that failed last said, in one line without any text of the rows."""

    def dismiss(self) -> None:
        """Call off those that have not started: nothing is left for them."""

    def cancel(self) -> None:
        """Stop them all. Safe to repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many replicas, and how patient."""

    replicas: int
    """Wanted from the start."""

    max_replicas: int
    """Never more at once, however late the run is."""

    max_attempts: int
    """Per shard and start."""

    seconds_left: float = math.inf
    """Until the deadline, when the waves begin."""

    poll_s: float = 10.0
    pause_s: float = 2.0
    """Before the second wave; doubles with each that commits nothing."""

    silent_s: float = _SILENT_S
    """Replicas that neither commit nor renew a lease for so long are taken for lost."""


@dataclass(slots=True)
class _Progress:
    """What was seen so far."""

    started_at: float = field(default_factory=time.monotonic)
    active_at: float = field(default_factory=time.monotonic)
    activity: frozenset[tuple[str, str]] = frozenset()
    wave: int = 0
    idle_waves: int = 0
    commits_at_wave: int = -1
    not_before: float = 0.0
    has_grown: bool = False
    """There may be more than one replica."""


def drain_by_waves(
    run: Run,
    fleet: Fleet,
    *,
    invocation: str,
    limits: Limits,
    should_stop: StopSignal,
    may_grow: Callable[[], bool] = lambda: True,
) -> dict[int, str]:
    """Bring up replicas until every shard is committed or given up; return the latter with why.

    While `may_grow` is False there is one replica at most; what it raises ends the waves.

    Raises:
        Stopped: `should_stop` was set or the start was cancelled; the fleet is stopped.
        BudgetSpent: the next shard would cost more than `budget.usd` leaves.
    """
    seen = _Progress()
    budget = BudgetGate(store=run.store, usd=run.job.budget.usd, cache=run.commit_cache)
    try:
        with should_stop.watched():
            while not (should_stop.is_set() or is_cancelled(run.store, invocation)):
                commits = run.commits()
                missing = [s.shard_id for s in run.shards if s.shard_id not in commits]
                if not missing:
                    fleet.dismiss()
                    return {}
                if not budget.allows():
                    fleet.dismiss()  # whoever has not started would find nothing to claim
                    if not fleet.num_running():
                        raise BudgetSpent(budget.reason or f"budget.usd is {budget.usd}; raise it")
                    _sleep(limits.poll_s, should_stop)
                    continue
                if not seen.has_grown and may_grow():
                    seen.has_grown, seen.idle_waves, seen.not_before = True, 0, 0.0
                given_up = _turn(run, fleet, invocation, limits, seen, missing, _shard_s(commits))
                if given_up is not None:
                    return given_up
                _sleep(limits.poll_s, should_stop)
        raise Stopped
    except BaseException:
        fleet.cancel()
        raise


def one_wave(
    run: Run, fleet: Fleet, *, count: int, invocation: str, poll_s: float, should_stop: StopSignal
) -> None:
    """Launch `count` replicas once and wait until none is left; raises as `drain_by_waves` does."""
    try:
        fleet.launch(0, count)
        with should_stop.watched():
            while fleet.num_live():
                if should_stop.is_set() or is_cancelled(run.store, invocation):
                    raise Stopped
                _sleep(poll_s, should_stop)
    except BaseException:
        fleet.cancel()
        raise


def _turn(
    run: Run,
    fleet: Fleet,
    invocation: str,
    limits: Limits,
    seen: _Progress,
    missing: list[int],
    shard_s: float,
) -> dict[int, str] | None:
    """Launch what is missing; the shards given up when nothing is left to wait for."""
    num_live = _num_live(run, fleet, limits, seen)
    wanted = _wanted(limits, seen, len(missing), shard_s)
    if num_live >= min(wanted, len(missing)):
        return None
    given_up = exhausted(run, missing, invocation, limits.max_attempts)
    leases = Leases(run.store, holder=holder_name(), is_dead=is_dead)
    todo = [shard_id for shard_id in missing if shard_id not in given_up]
    held = {shard_id for shard_id in todo if leases.is_taken(shard_id)}
    if not todo and not num_live:
        return given_up
    # A live replica that holds nothing yet will take a free shard before a new one could.
    free = len(todo) - len(held)
    idle_live = max(0, num_live - len(held))
    count = min(wanted - num_live, free - idle_live)
    if count <= 0 or time.monotonic() < seen.not_before:
        return None
    if not _may_launch(seen, limits, len(run.shards) - len(missing)):
        if num_live:
            return None
        said = fleet.last_words() or "see their flow runs"
        why = f"{MAX_IDLE_WAVES} waves of replicas committed nothing; {said}"
        return {**dict.fromkeys(todo, why), **given_up}
    log.info(
        "wave=%d replicas=%d missing_shards=%d live=%d", seen.wave, count, len(missing), num_live
    )
    fleet.launch(seen.wave, count)
    seen.wave += 1
    seen.active_at = time.monotonic()
    return None


def exhausted(
    run: Run, missing: Iterable[int], invocation: str, max_attempts: int
) -> dict[int, str]:
    """Return the missing shards that this start shall not try again, with the last error."""
    listed = (keys.parse_attempt(info.key) for info in run.store.list(keys.ATTEMPTS))
    tried = {key.shard_id for key in listed if key is not None}
    found = {}
    for shard_id in tried.intersection(missing):
        ours = [a for a in attempts_of(run.store, shard_id) if a.invocation == invocation]
        failures = [a.failure for a in ours if a.failure is not None]
        is_fatal = bool(failures) and not failures[-1].retryable
        if len(ours) < max_attempts and not is_fatal:
            continue
        if failures:
            found[shard_id] = f"{failures[-1].error}: {failures[-1].message}"
        else:
            found[shard_id] = f"{len(ours)} replicas died while they worked on it"
    return found


def desired_replicas(limits: Limits, *, elapsed_s: float, num_missing: int, shard_s: float) -> int:
    """Return how many replicas keep the deadline: what was asked for, more when late.

    Args:
        limits: What was asked for, and the most there may be.
        elapsed_s: Since the waves began.
        num_missing: Shards not committed.
        shard_s: What a replica has taken for a shard so far; 0 when unknown.
    """
    if not shard_s or math.isinf(limits.seconds_left):
        return min(limits.replicas, limits.max_replicas)
    left_s = limits.seconds_left - elapsed_s
    # Past the deadline everything there is, for what is left.
    needed = math.ceil(num_missing * shard_s / left_s) if left_s > 0 else num_missing
    return min(limits.max_replicas, max(limits.replicas, needed))


def _wanted(limits: Limits, seen: _Progress, num_missing: int, shard_s: float) -> int:
    if not seen.has_grown:
        return 1
    elapsed_s = time.monotonic() - seen.started_at
    return desired_replicas(limits, elapsed_s=elapsed_s, num_missing=num_missing, shard_s=shard_s)


def _shard_s(commits: Mapping[int, CommitRecord]) -> float:
    """Mean seconds of a replica for one committed shard, by the receipts; 0 without any."""
    receipts = (record.receipt for record in commits.values())
    totals = [sum((receipt.get("seconds") or {}).values()) for receipt in receipts]
    return sum(totals) / len(totals) if totals else 0.0


def _num_live(run: Run, fleet: Fleet, limits: Limits, seen: _Progress) -> int:
    num_live = fleet.num_live()
    found = [*run.store.list(keys.LEASES), *run.store.list(keys.COMMITS)]
    activity = frozenset((info.key, info.etag) for info in found if info.key != keys.LEASE_CLOCK)
    if activity != seen.activity or not fleet.num_running():
        seen.activity, seen.active_at = activity, time.monotonic()
    if time.monotonic() - seen.active_at < limits.silent_s:
        return num_live
    log.warning("%d replicas gave no sign of life for %.0f s", num_live, limits.silent_s)
    fleet.cancel()
    seen.active_at = time.monotonic()
    return 0


def _may_launch(seen: _Progress, limits: Limits, num_commits: int) -> bool:
    """Bound the waves that commit nothing, with a growing pause between them."""
    if num_commits > seen.commits_at_wave:
        seen.commits_at_wave, seen.idle_waves = num_commits, 0
    if seen.idle_waves >= MAX_IDLE_WAVES:
        return False
    seen.idle_waves += 1
    seen.not_before = time.monotonic() + limits.pause_s * 2 ** (seen.idle_waves - 1)
    return True


def _sleep(seconds: float, should_stop: StopSignal) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not should_stop.is_set():
        time.sleep(min(0.5, seconds))
