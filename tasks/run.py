"""One run from job to a plan, as plain functions; the command line and the flows call the same ones.

    prepare -> drain (once per replica, `tasks.drain`) -> finish (`tasks.finish`)

prepare: preflight, run.json, plan; everything that can be wrong is said before a model is loaded.
attach: the same from a run folder, for a replica that joins.
"""

import dataclasses
from pathlib import Path

from inference.errors import ModelError
from storage import keys
from storage.errors import BadInput, InputChanged
from storage.inputs import InputFiles
from storage.manifest import PlanManifest, RunRecord, digest, to_json
from storage.object_store import ObjectStore, open_store
from storage.probe import probe_store
from tasks.choose_tier import settle_backend
from tasks.feed_process import FeedProcess
from tasks.fingerprint import default_run_id, fingerprint, fingerprint_fields
from tasks.job import RunConfig
from tasks.model import RunModel, begin_model, peek_model
from tasks.plan import make_plan
from tasks.planned_run import Run
from tasks.progress import Progress
from tasks.run_forecast import refuse_over_budget
from tasks.run_record import load_shards, planned, write_record

__all__ = ["Run", "attach", "prepare"]


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
    model = peek_model(job, work_dir=work_dir, progress=progress)
    job = _pinned(job, model)
    process = FeedProcess.of(job, model_dir=model.path, max_model_len=model.max_model_len)
    try:
        run = _planned(job, root, model, process, work_dir=work_dir, progress=progress)
        run.feed_process = process
        if job.budget.usd is not None and not run.commits():
            refuse_over_budget(job, run.plan, model.path)
        return run
    except BaseException:
        process.close()
        model.close()
        raise


def attach(
    job: RunConfig,
    record: RunRecord,
    store: ObjectStore,
    *,
    work_dir: Path,
    progress: Progress,
    is_replica: bool = True,
) -> Run:
    """Join a planned run.

    Args:
        job: The job.
        record: Of the run.
        store: The run folder.
        work_dir: A scratch folder of the caller's.
        progress: Counters to keep.
        is_replica: Whether an engine will run here, so that the weights can be on their way already.

    Raises:
        BadInput: the folder has no plan.
        ModelError: the model found here is not the one the run was planned with; where weights are
            still on their way, the engine that loads them raises it.
    """
    plan = planned(store)
    if is_replica:
        model = begin_model(job, progress=progress)
    else:
        model = peek_model(job, work_dir=work_dir, progress=progress)
    try:
        model.expect(record.fingerprint_fields["model.content_id"])
    except ModelError:
        model.close()
        raise
    return _run(job, record, store, plan, model, work_dir)


def _check_single_writer(job: RunConfig) -> None:
    replicas = job.hardware.replicas
    if job.storage.allow_single_writer and replicas not in ("auto", 1):
        raise BadInput(
            f"storage.allow_single_writer promises one replica, and hardware.replicas is {replicas}; "
            "set it to 1, or use a store with conditional writes"
        )


def _planned(
    job: RunConfig,
    root: ObjectStore,
    model: RunModel,
    process: FeedProcess,
    *,
    work_dir: Path,
    progress: Progress,
) -> Run:
    """Name the run by what it is made of, record it in its folder and plan it, or find its plan there."""
    assert model.content_id is not None, "a look tells which model it is"
    progress.phase = "listing inputs"
    inputs = InputFiles(work_dir, job.storage)
    files = inputs.expand(job.input.uri)
    fields = fingerprint_fields(
        job,
        model_content_id=model.content_id,
        backend=settle_backend(job, model.path).engine.backend,
        max_model_len=model.max_model_len,
    )
    etags = [file.etag for file in files]
    run_id = job.run_id or default_run_id(job.name, fingerprint(fields), etags)
    store = open_store(f"{root.uri}/{run_id}", job.storage)
    record = write_record(store, job, run_id, fields)
    store.put(keys.JOB, to_json(dataclasses.asdict(job)))
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
        process=process,
    )
    _check_inputs(plan, [(file.uri, file.etag) for file in files])
    return _run(job, record, store, plan, model, work_dir)


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


def _pinned(job: RunConfig, model: RunModel) -> RunConfig:
    """The job as replicas elsewhere are given it: a branch of the Hub may move before they ask."""
    if not job.model.source.startswith("hf://"):
        return job
    return dataclasses.replace(job, model=dataclasses.replace(job.model, source=model.uri))


def _check_inputs(plan: PlanManifest, found: list[tuple[str, str]]) -> None:
    """Refuse a plan that was made of other files.

    Raises:
        InputChanged: names the first file that differs, with old and new ETag.
    """
    planned = [(file.uri, file.etag) for file in plan.inputs]
    if planned == found:
        return
    is_moved = [etag for _, etag in planned] == [etag for _, etag in found]
    for (old_uri, old_etag), (uri, etag) in zip(planned, found, strict=False):
        if is_moved and old_uri != uri:
            raise InputChanged(
                f"{uri}: the same bytes as {old_uri}, which this run was planned with; give that place "
                "again, or another run_id, so that they make a run of their own"
            )
        if (old_uri, old_etag) != (uri, etag):
            raise InputChanged(
                f"{uri}: ETag {etag}, this run was planned with {old_uri}, ETag {old_etag}; "
                "give another run_id, or drop run_id so that new files make a new run"
            )
    raise InputChanged(
        f"{len(found)} input files, this run was planned with {len(planned)}; "
        "give another run_id, or drop run_id so that new files make a new run"
    )
