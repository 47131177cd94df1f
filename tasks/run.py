"""One run from job to manifest, as plain functions; the command line and the flows call the same ones.

prepare -> drain (once per replica) -> finish

prepare   preflight, run.json, plan: everything that can be wrong is said before a model is loaded
attach    the same from a run folder, for a replica that joins
drain     one replica until no shard can be had
finish    reveal what is committed, publish when all is
"""

import dataclasses
import logging
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from inference.backends import Backend, create_backend, resolve_backend
from inference.config import EngineConfig
from inference.errors import ModelError
from storage import keys
from storage.commits import CommitCache, current_commits, read_commits
from storage.errors import AlreadyExists, BadInput, InputChanged, NotFound, StorageError
from storage.failpoints import failpoint
from storage.inputs import InputFiles
from storage.lease import Leases
from storage.manifest import CommitRecord, PlanManifest, RunManifest, RunRecord, Shard, digest
from storage.object_store import ObjectStore, open_store
from storage.probe import probe_store
from storage.reveal import read_manifest
from tasks.budget import BudgetGate, BudgetSpent
from tasks.canary import kept_answers
from tasks.cancel import CancelWatch
from tasks.claims import Claims
from tasks.commit_shard import ShardCommitter
from tasks.feed import PromptFeed, input_schema
from tasks.fingerprint import (
    check_fingerprint,
    default_run_id,
    fingerprint,
    fingerprint_fields,
    versions,
)
from tasks.gpu_sample import DeviceSampler, open_gpu
from tasks.history import past_run, remember
from tasks.holder import holder_name, is_dead
from tasks.job import RunConfig, job_of
from tasks.metrics import ReplicaCollector, exported
from tasks.model import RunModel, open_model
from tasks.plan import load_plan, load_shards, make_plan
from tasks.preflight import refuse_over_budget
from tasks.progress import Progress
from tasks.publish import publish_run, reveal_all
from tasks.replica import Replica, ShardOutcome
from tasks.results import ResultColumns
from tasks.stop import Stopped, StopSignal
from tasks.yardstick import Yardstick

log = logging.getLogger("nightjar.run")

RunShard = Callable[[Replica, int], ShardOutcome]


@dataclasses.dataclass(slots=True, kw_only=True)
class Run:
    """A planned run and how to reach everything of it."""

    job: RunConfig
    record: RunRecord
    store: ObjectStore
    plan: PlanManifest
    plan_digest: str
    shards: list[Shard]
    model: RunModel
    work_dir: Path
    max_model_len: int
    commit_cache: CommitCache = dataclasses.field(default_factory=dict)
    warm_backend: Backend | None = None
    """The engine of the canary, for the first replica in this process to take over."""

    @property
    def uri(self) -> str:
        """The run folder."""
        return self.store.uri

    @property
    def columns(self) -> ResultColumns:
        """Result columns of this run's parts."""
        return ResultColumns(
            token_ids=self.job.output.token_ids, logprobs=self.job.sampling.logprobs is not None
        )

    def take_backend(self) -> Backend | None:
        """Hand the canary's engine over; None if there is none."""
        backend, self.warm_backend = self.warm_backend, None
        return backend

    def commits(self) -> dict[int, CommitRecord]:
        """Return what is committed now, by shard."""
        return current_commits(self.store, self.plan_digest, cache=self.commit_cache)


@dataclasses.dataclass(slots=True)
class DrainReport:
    """How one replica's drain ended."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    exhausted: dict[int, str] = dataclasses.field(default_factory=dict)
    num_pending: int = 0
    """Shards that others hold."""

    is_cancelled: bool = False
    """Somebody has cancelled the run; leases are released and the rest is resumable."""


def prepare(job: RunConfig, *, work_dir: Path, progress: Progress) -> Run:
    """Check everything, write run.json and the plan; a run that exists is taken up again.

    Raises:
        StorageError, InferenceError: what is wrong, before any shard, with what to change.
    """
    _check_single_writer(job)
    progress.phase = "checking the store"
    root = open_store(job.output.uri, job.storage)
    probe_store(root, allow_single_writer=job.storage.allow_single_writer)
    progress.phase = "checking the model"
    model = open_model(job, progress=progress)
    try:
        progress.phase = "listing inputs"
        inputs = InputFiles(work_dir, job.storage)
        files = inputs.expand(job.input.uri)
        backend = resolve_backend(job.engine.backend)
        fields = fingerprint_fields(
            job,
            model_content_id=model.content_id,
            backend=backend,
            max_model_len=model.max_model_len,
        )
        run_id = job.run_id or default_run_id(
            job.name, fingerprint(fields), [file.etag for file in files]
        )
        store = open_store(f"{root.uri}/{run_id}", job.storage)
        record = _write_record(store, job, run_id, fields)
        progress.phase = "planning"
        plan = make_plan(
            job=job,
            record=record,
            store=store,
            model_dir=model.path,
            work_dir=work_dir,
            max_model_len=model.max_model_len,
            on_progress=progress.planned,
            files=inputs,
        )
        _check_inputs(plan, [(file.uri, file.etag) for file in files])
        run = _run(job, record, store, plan, model, work_dir)
        if job.budget.usd is not None and not run.commits():
            refuse_over_budget(job, plan, model.path)
        return run
    except BaseException:
        model.close()
        raise


def attach(
    job: RunConfig, record: RunRecord, store: ObjectStore, *, work_dir: Path, progress: Progress
) -> Run:
    """Join a planned run as another replica.

    Raises:
        BadInput: the folder has no plan.
        ModelError: the model found here is not the one the run was planned with.
    """
    plan = planned(store)
    model = open_model(job, progress=progress)
    wanted = record.fingerprint_fields["model.content_id"]
    if model.content_id != wanted:
        model.close()
        raise ModelError(
            f"model {job.model.source}: content {model.content_id[:12]}, this run was planned with "
            f"{wanted[:12]}; restore the weights or start a new run"
        )
    return _run(job, record, store, plan, model, work_dir)


def read_record(store: ObjectStore) -> RunRecord:
    """Read run.json. Raises BadInput when the folder is not a run's."""
    try:
        return RunRecord.from_json(store.get(keys.RUN), source=f"{store.uri}/{keys.RUN}")
    except NotFound:
        raise BadInput(
            f"{store.uri}: no run.json; give a run folder, such as OUTPUT_URI/RUN_ID"
        ) from None


def drain(
    run: Run,
    *,
    invocation: str,
    progress: Progress,
    should_stop: StopSignal,
    run_shard: RunShard = Replica.finish_shard,
    failed_rows: bool = False,
    budget_s: float = math.inf,
    build_backend: Callable[[EngineConfig], Any] = create_backend,
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
    budget = BudgetGate(store=run.store, usd=run.job.budget.usd)
    with PromptFeed(
        job=run.job,
        model_dir=run.model.path,
        store=run.store,
        work_dir=run.work_dir,
        max_model_len=run.max_model_len,
    ) as feed:
        watch = CancelWatch(run.store, invocation, should_stop)
        replica = Replica(
            plan=run.plan,
            claims=claims,
            feed=feed,
            committer=committer,
            build_backend=lambda: run.take_backend() or build_backend(engine_config(run)),
            columns=run.columns,
            input_schema=input_schema(run.plan),
            work_dir=run.work_dir,
            progress=progress,
            should_stop=watch,
            may_claim=budget.allows,
            kept=kept_answers(run.store),
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
        staging_gb_per_s=run.model.staged.report.gb_per_s if run.model.staged else None,
        gpu=gpu,
    )


def finish(
    store: ObjectStore, progress: Progress, *, cache: CommitCache | None = None
) -> RunManifest | None:
    """Reveal what is committed and publish when every shard is; None while shards are missing.

    Args:
        store: The run folder.
        progress: Counters to keep.
        cache: Commits known already; what is read is added.
    """
    progress.phase = "publishing"
    plan = planned(store)
    plan_digest = digest(store.get(keys.PLAN))
    commits = current_commits(store, plan_digest, cache=cache)
    healed = reveal_all(store, commits)
    if healed:
        log.info("completions brought in line for %d shards", len(healed))
    before = read_manifest(store)
    manifest = publish_run(store, plan, plan_digest, commits)
    if manifest is not None and (before is None or before.revision != manifest.revision):
        remember_run(store, manifest, commits)
        draw_report(store, cache)
    return manifest


def remember_run(
    store: ObjectStore, manifest: RunManifest, commits: Mapping[int, CommitRecord]
) -> None:
    """Keep lengths and speed for the next forecast; a store that refuses costs only that."""
    record = read_record(store)
    if any(commit.revision > 1 for commit in commits.values()):
        return  # the receipts of redone shards cover their redone rows only
    try:
        remember(job_of(record), past_run(record, manifest, commits))
    except StorageError as error:
        log.warning("history not written: %s", error)


def draw_report(store: ObjectStore, cache: CommitCache | None = None) -> None:
    """Draw report.html; what goes wrong with it costs the report, never the run."""
    from tasks.report import write_report  # draws, and drawing is heavy

    try:
        write_report(store, cache=cache)
    except StorageError as error:
        log.warning("report not written: %s", error)


def planned(store: ObjectStore) -> PlanManifest:
    """Read the plan. Raises BadInput when the folder has none."""
    plan = load_plan(store)
    if plan is None:
        raise BadInput(f"{store.uri}: no plan.json; start the run with `nightjar run JOB` first")
    return plan


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
        tensor_parallel_size=1
        if knobs.tensor_parallel_size == "auto"
        else knobs.tensor_parallel_size,
        seed=run.job.sampling.seed,
    )


def new_invocation() -> str:
    """Name one start of a run over all its replicas."""
    return secrets.token_hex(8)


def _check_single_writer(job: RunConfig) -> None:
    replicas = job.hardware.replicas
    if job.storage.allow_single_writer and replicas not in ("auto", 1):
        raise BadInput(
            f"storage.allow_single_writer promises one replica, and hardware.replicas is {replicas}; "
            "set it to 1, or use a store with conditional writes"
        )


def _run(
    job: RunConfig,
    record: RunRecord,
    store: ObjectStore,
    plan: PlanManifest,
    model: RunModel,
    work_dir: Path,
) -> Run:
    return Run(
        job=job,
        record=record,
        store=store,
        plan=plan,
        plan_digest=digest(store.get(keys.PLAN)),
        shards=load_shards(store, plan),
        model=model,
        work_dir=work_dir,
        max_model_len=record.fingerprint_fields["engine.max_model_len"],
    )


def _write_record(
    store: ObjectStore, job: RunConfig, run_id: str, fields: dict[str, Any]
) -> RunRecord:
    record = RunRecord(
        run_id=run_id,
        name=job.name,
        fingerprint=fingerprint(fields),
        fingerprint_fields=fields,
        job=dataclasses.asdict(job),
        versions=versions(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        store.put_if_absent(keys.RUN, record.to_json())
    except AlreadyExists:
        standing = read_record(store)
        check_fingerprint(store.uri, standing.fingerprint_fields, fields)
        return standing
    failpoint("after_record")
    return record


def _check_inputs(plan: PlanManifest, found: list[tuple[str, str]]) -> None:
    """Refuse a plan that was made of other files.

    Raises:
        InputChanged: names the first file that differs, with old and new ETag.
    """
    planned = [(file.uri, file.etag) for file in plan.inputs]
    if planned == found:
        return
    for (old_uri, old_etag), (uri, etag) in zip(planned, found, strict=False):
        if (old_uri, old_etag) != (uri, etag):
            raise InputChanged(
                f"{uri}: ETag {etag}, this run was planned with {old_uri}, ETag {old_etag}; "
                "give another run_id, or drop run_id so that new files make a new run"
            )
    raise InputChanged(
        f"{len(found)} input files, this run was planned with {len(planned)}; "
        "give another run_id, or drop run_id so that new files make a new run"
    )


def _work_left(
    shards: list[Shard], commits: Mapping[int, CommitRecord], failed_rows: bool
) -> tuple[list[Shard], dict[int, CommitRecord]]:
    missing = [shard for shard in shards if shard.shard_id not in commits]
    if not failed_rows:
        return missing, {}
    bases = {i: record for i, record in commits.items() if has_failed_rows(record)}
    return [s for s in shards if s.shard_id not in commits or s.shard_id in bases], bases


def has_failed_rows(record: CommitRecord) -> bool:
    """Whether the shard has output rows without an answer."""
    from storage.records import ANSWERED

    return any(count and state not in ANSWERED for state, count in record.counts.items())
