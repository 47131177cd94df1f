"""One replica drains a run: claims shards, runs them, until none can be had."""

import dataclasses
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

from inference.backends import create_backend
from storage.commits import Commits, read_commits
from storage.lease import Leases
from storage.manifest import CommitRecord, Shard
from storage.records import num_unanswered
from tasks.budget import MOST_UNSEEN, BudgetGate, BudgetSpent
from tasks.canary import kept_answers
from tasks.cancel import CancelWatch
from tasks.claims import Claims
from tasks.commit_shard import ShardCommitter
from tasks.content import engine_digest
from tasks.feed import PromptFeed, input_schema
from tasks.gpu_sample import DeviceSampler, open_gpu
from tasks.holder import holder_name, is_dead
from tasks.metering import Metering
from tasks.metrics import ReplicaCollector, exported
from tasks.progress import Progress
from tasks.read_shard import ShardReader
from tasks.replica import Replica, ShardOutcome
from tasks.replica_engine import ReplicaEngine
from tasks.run import Run
from tasks.run_engine import build_engine
from tasks.stop import Stopped, StopSignal
from tasks.yardstick import Yardstick

RunShard = Callable[[Replica, int], ShardOutcome]


@dataclasses.dataclass(slots=True)
class DrainReport:
    """How one replica's drain ended."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    exhausted: dict[int, str] = dataclasses.field(default_factory=dict)
    num_pending: int = 0
    """Shards that others hold."""

    is_cancelled: bool = False
    """Somebody has cancelled the run; leases are released and the rest is resumable."""


def drain(
    run: Run,
    *,
    invocation: str,
    progress: Progress,
    should_stop: StopSignal,
    run_shard: RunShard = Replica.finish_shard,
    failed_rows: bool = False,
    budget_s: float = math.inf,
    build_backend: Callable[..., Any] = create_backend,
) -> DrainReport:
    """Run one replica until no shard can be had; with `failed_rows`, redo failed rows instead.

    Args:
        run: The planned run.
        invocation: Shared by all replicas of one start; attempts are bounded within it.
        progress: Counters to keep.
        should_stop: Ends the drain with `Stopped`, leases released.
        run_shard: What runs one shard; a flow passes a task around `Replica.finish_shard`.
        failed_rows: Redo rows without an answer, in new revisions of their shards.
        budget_s: No further shard is claimed after this many seconds.
        build_backend: Loads the engine; replaced by tests only to break it.

    Raises:
        BudgetSpent: the next shard would cost more than `budget.usd` leaves; all else is committed.
    """
    standing = read_commits(run.store, run.plan_digest, cache=run.commit_cache)
    todo, bases = _work_left(run.shards, standing.current, failed_rows)
    _expect(run, progress, standing.current, bases)
    if not todo:
        return DrainReport()
    claims = _claims(run, todo, bases, standing, invocation, time.monotonic() + budget_s)
    budget = BudgetGate(
        store=run.store, usd=run.job.budget.usd, most_unseen=MOST_UNSEEN, cache=run.commit_cache
    )
    with closing(CancelWatch(run.store, invocation, should_stop)) as watch:
        outcomes = _finish_shards(
            run, claims, budget, watch, should_stop, progress, run_shard, build_backend
        )
    if budget.reason is not None and claims.num_pending:
        raise BudgetSpent(budget.reason)
    return DrainReport(
        outcomes=outcomes,
        exhausted=dict(claims.exhausted),
        num_pending=claims.num_pending,
        is_cancelled=claims.is_cancelled or watch.is_cancelled,
    )


def _expect(
    run: Run,
    progress: Progress,
    commits: Mapping[int, CommitRecord],
    bases: Mapping[int, CommitRecord],
) -> None:
    """Tell `progress` what there is to do in all, and what is done of it."""
    progress.expect(num_rows=run.plan.num_rows * run.plan.num_samples, num_shards=len(run.shards))
    for shard_id, commit in commits.items():
        if shard_id not in bases:
            progress.already_done(Counter(commit.counts))


def _claims(
    run: Run,
    todo: list[Shard],
    bases: Mapping[int, CommitRecord],
    standing: Commits,
    invocation: str,
    claim_until: float,
) -> Claims:
    holder = holder_name()
    return Claims(
        store=run.store,
        shards=todo,
        leases=Leases(run.store, holder=holder, is_dead=is_dead),
        commits=standing,
        holder=holder,
        invocation=invocation,
        max_attempts=run.job.shards.max_attempts,
        bases=bases,
        claim_until=claim_until,
    )


def _finish_shards(
    run: Run,
    claims: Claims,
    budget: BudgetGate,
    watch: CancelWatch,
    should_stop: StopSignal,
    progress: Progress,
    run_shard: RunShard,
    build_backend: Callable[..., Any],
) -> Counter[str]:
    """Run shards until none can be had; return how their attempts ended. A cancellation ends it too.

    Raises:
        Stopped: `should_stop` was set.
    """
    outcomes: Counter[str] = Counter()
    gpu = open_gpu()
    with _open_replica(run, claims, budget, watch, progress, gpu, build_backend) as replica:
        collector = partial(_collector, run, replica, progress, gpu)
        exporter = exported(run.job.metrics, collector, claims.holder.replace("/", "-"))
        try:
            with should_stop.watched(), exporter:
                while (next_id := replica.next_shard()) is not None:
                    outcomes[run_shard(replica, next_id).outcome] += 1
        except Stopped:
            if not watch.is_cancelled:
                raise
    return outcomes


@contextmanager
def _open_replica(
    run: Run,
    claims: Claims,
    budget: BudgetGate,
    watch: CancelWatch,
    progress: Progress,
    gpu: Any | None,
    build_backend: Callable[..., Any],
) -> Iterator[Replica]:
    """Yield a replica on a feed of its own; close both, and tell what the feed warned of."""
    stopping = threading.Event()
    with closing(DeviceSampler(gpu)) as sampler, run.open_feed() as feed:
        replica = Replica(
            claims=claims,
            reader=_reader(run, feed),
            engine=ReplicaEngine(
                build=lambda: run.take_backend() or build_engine(run, build_backend),
                take_waited_s=run.model.take_waited_s,
                metering=Metering(run.take_spent()),
                progress=progress,
            ),
            committer=_committer(run, claims.holder, stopping, sampler),
            progress=progress,
            should_stop=watch,
            may_claim=budget.allows,
        )
        try:
            yield replica
        finally:
            stopping.set()
            replica.close()
        for warning in feed.warnings:
            progress.note(warning)


def _reader(run: Run, feed: PromptFeed) -> ShardReader:
    return ShardReader(
        plan=run.plan,
        store=run.store,
        feed=feed,
        columns=run.columns,
        input_schema=input_schema(run.plan),
        work_dir=run.work_dir,
        kept=kept_answers(run.store),
        engine=engine_digest(run.record.fingerprint_fields),
        reuse=run.open_reuse(),
    )


def _committer(
    run: Run, holder: str, stopping: threading.Event, sampler: DeviceSampler
) -> ShardCommitter:
    return ShardCommitter(
        store=run.store,
        plan_digest=run.plan_digest,
        holder=holder,
        stage_s=run.model.stage_s,
        stopping=stopping,
        device=sampler.take,
        measure=lambda info: Yardstick.of(run.job, run.model.path, info),
    )


def _collector(run: Run, replica: Replica, progress: Progress, gpu: Any | None) -> ReplicaCollector:
    return ReplicaCollector(
        replica,
        progress,
        labels={"run": run.record.run_id, "job": run.job.name},
        staging_gb_per_s=lambda: run.model.staged and run.model.staged.report.gb_per_s,
        gpu=gpu,
    )


def new_invocation() -> str:
    """Name one start of a run over all its replicas."""
    return secrets.token_hex(8)


def _work_left(
    shards: list[Shard], commits: Mapping[int, CommitRecord], failed_rows: bool
) -> tuple[list[Shard], dict[int, CommitRecord]]:
    missing = [shard for shard in shards if shard.shard_id not in commits]
    if not failed_rows:
        return missing, {}
    bases = {i: record for i, record in commits.items() if num_unanswered(record.counts)}
    return [s for s in shards if s.shard_id not in commits or s.shard_id in bases], bases
