"""One replica drains a run: claims shards, runs them, until none can be had."""

import dataclasses
import logging
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from inference.backends import create_backend
from inference.config import EngineConfig
from storage.commits import read_commits
from storage.lease import Leases
from storage.manifest import CommitRecord, Shard
from storage.records import num_unanswered
from tasks.budget import MOST_UNSEEN, BudgetGate, BudgetSpent
from tasks.canary import kept_answers
from tasks.cancel import CancelWatch
from tasks.claims import Claims
from tasks.commit_shard import ShardCommitter
from tasks.content import engine_digest
from tasks.feed import input_schema
from tasks.gpu_sample import DeviceSampler, open_gpu
from tasks.holder import holder_name, is_dead
from tasks.metering import Metering
from tasks.metrics import ReplicaCollector, exported
from tasks.progress import Progress
from tasks.ranks import distributed_of, num_ranks
from tasks.read_shard import ShardReader
from tasks.replica import Replica, ShardOutcome
from tasks.replica_engine import ReplicaEngine
from tasks.run import Run
from tasks.stop import Stopped, StopSignal
from tasks.yardstick import Yardstick

log = logging.getLogger("nightjar.drain")

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
    commits = standing.current
    todo, bases = _work_left(run.shards, commits, failed_rows)
    progress.expect(num_rows=run.plan.num_rows * run.plan.num_samples, num_shards=len(run.shards))
    for shard_id, commit in commits.items():
        if shard_id not in bases:
            progress.already_done(Counter(commit.counts))
    report = DrainReport()
    if not todo:
        return report
    holder = holder_name()
    stopping = threading.Event()
    claims = Claims(
        store=run.store,
        shards=todo,
        leases=Leases(run.store, holder=holder, is_dead=is_dead),
        commits=standing,
        holder=holder,
        invocation=invocation,
        max_attempts=run.job.shards.max_attempts,
        bases=bases,
        claim_until=time.monotonic() + budget_s,
    )
    gpu = open_gpu()
    sampler = DeviceSampler(gpu)
    committer = ShardCommitter(
        store=run.store,
        plan_digest=run.plan_digest,
        holder=holder,
        stage_s=run.model.stage_s,
        stopping=stopping,
        device=sampler.take,
        measure=lambda info: Yardstick.of(run.job, run.model.path, info),
    )
    budget = BudgetGate(
        store=run.store,
        usd=run.job.budget.usd,
        most_unseen=MOST_UNSEEN,
        cache=run.commit_cache,
    )
    with run.open_feed() as feed:
        watch = CancelWatch(run.store, invocation, should_stop)
        replica = Replica(
            claims=claims,
            reader=ShardReader(
                plan=run.plan,
                store=run.store,
                feed=feed,
                columns=run.columns,
                input_schema=input_schema(run.plan),
                work_dir=run.work_dir,
                kept=kept_answers(run.store),
                engine=engine_digest(run.record.fingerprint_fields),
                reuse=run.open_reuse(),
            ),
            engine=ReplicaEngine(
                build=lambda: run.take_backend() or build_engine(run, build_backend),
                take_waited_s=run.model.take_waited_s,
                metering=Metering(run.take_spent()),
                progress=progress,
            ),
            committer=committer,
            progress=progress,
            should_stop=watch,
            may_claim=budget.allows,
        )
        collector = partial(_collector, run, replica, progress, gpu)
        exporter = exported(run.job.metrics, collector, holder.replace("/", "-"))
        try:
            with should_stop.watched(), exporter:
                while (next_id := replica.next_shard()) is not None:
                    report.outcomes[run_shard(replica, next_id).outcome] += 1
        except Stopped:
            if not watch.is_cancelled:
                raise
        finally:
            stopping.set()
            replica.close()
            watch.close()
            sampler.close()
        for warning in feed.warnings:
            progress.note(warning)
    if budget.reason is not None and claims.num_pending:
        raise BudgetSpent(budget.reason)
    report.exhausted = dict(claims.exhausted)
    report.num_pending = claims.num_pending
    report.is_cancelled = claims.is_cancelled or watch.is_cancelled
    return report


def _collector(run: Run, replica: Replica, progress: Progress, gpu: Any | None) -> ReplicaCollector:
    return ReplicaCollector(
        replica,
        progress,
        labels={"run": run.record.run_id, "job": run.job.name},
        staging_gb_per_s=lambda: run.model.staged and run.model.staged.report.gb_per_s,
        gpu=gpu,
    )


def build_engine(run: Run, build_backend: Callable[..., Any] = create_backend) -> Any:
    """Build the engine of a run, from weights that may still be on their way.

    Raises:
        ModelError: the weights are not those that the run was planned with.
        StorageError: they could not be staged.
    """
    files = run.model.files()
    if files is None:
        return build_backend(engine_config(run))
    waited_before_s = files.waited_s
    config = dataclasses.replace(engine_config(run), model=str(files.folder()))
    # Where staging has only begun here, this was its beginning.
    before_s = run.model.stage_s + files.waited_s - waited_before_s
    began, began_waited_s = time.monotonic(), files.waited_s
    backend = build_backend(config, arriving=files)
    waited_s = files.waited_s - began_waited_s
    run.model.waited_s = files.waited_s - waited_before_s
    try:
        run.model.wait()
    except BaseException:
        backend.close()
        raise
    from tasks.stage import describe_cold_start  # boto3, which by now is imported

    ready_s = time.monotonic() - began
    log.info(
        "%s",
        describe_cold_start(
            run.model.staged.report, before_s=before_s, ready_s=ready_s, waited_s=waited_s
        ),
    )
    return backend


def engine_config(run: Run) -> EngineConfig:
    """Return what this run's replicas are built from."""
    knobs = run.job.engine
    return EngineConfig(
        model=str(run.model.path),
        backend=run.record.fingerprint_fields["engine.backend"],
        dtype=run.job.model.dtype,
        quantization=run.job.model.quantization,
        max_num_seqs=knobs.max_num_seqs,
        max_num_batched_tokens=knobs.max_num_batched_tokens,
        max_model_len=run.max_model_len,
        kv_cache_dtype=knobs.kv_cache_dtype,
        tensor_parallel_size=num_ranks(run),
        distributed=distributed_of(run.job),
        enforce_eager=knobs.enforce_eager,
        offload=knobs.offload,
        nvme_path=knobs.nvme_path,
        seed=run.job.sampling.seed,
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
