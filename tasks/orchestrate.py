"""One start of a run, from job to manifest: plan, bring up replicas, publish.

The command line and the Prefect flow call `generate` alike; what differs is handed in: how a step is
shown (`Step`) and who drains the shards (`Drainer`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from inference.errors import InferenceError
from storage.commits import CommitCache
from storage.errors import StorageError
from storage.manifest import RunManifest
from storage.object_store import ObjectStore
from tasks.cancel import exempt
from tasks.drain import DrainReport, RunShard, drain, new_invocation
from tasks.finish import finish
from tasks.job import RunConfig
from tasks.launch import run_replicas
from tasks.progress import Progress
from tasks.publish import num_failed, reveal_all
from tasks.replica import Replica
from tasks.run import Run, attach, prepare
from tasks.run_record import read_record
from tasks.scratch import scratch_folder
from tasks.status import run_status
from tasks.stop import Broken, StopSignal
from tasks.try_canary import try_canary
from tasks.watch import EVERY_S, OnLook, watching

T = TypeVar("T")

Drainer = Callable[[Run], Mapping[int, str]]
"""Brings up replicas, waits for them, and returns the shards given up, with the last error."""

Watched = Callable[[str], OnLook | None]
"""Makes what shows a run while it is drained, by its id."""

LOOK_EVERY_S = 10.0
"""Between two looks when somebody shows them."""


class Step(Protocol):
    """Runs one named step; a flow shows it as a task run."""

    def __call__(self, name: str, work: Callable[[], T], /) -> T:
        """Return what `work` returns, or raise what it raises."""


@contextmanager
def _breakable(run: Run) -> Iterator[None]:
    """Tell a run that broke with something to show from one that never began.

    Raises:
        Broken: something is committed; running again goes on from there.
    """
    try:
        yield
    except (StorageError, InferenceError) as error:
        if _has_results(run):
            raise Broken(str(error)) from error
        raise


def _has_results(run: Run) -> bool:
    try:
        return bool(run.commits())
    except StorageError:
        return True  # the store is what broke; nothing is known to be wrong with the job


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one start of a run ended."""

    job: RunConfig
    store: ObjectStore
    exhausted: Mapping[int, str]
    """Shards given up, with the last error."""

    manifest: RunManifest | None
    """None while shards are missing."""

    is_cancelled: bool = False
    """Somebody cancelled this start."""

    commit_cache: CommitCache = field(default_factory=dict, repr=False)
    """What was read of the store already."""

    @property
    def is_within_limit(self) -> bool:
        """Whether no more rows failed than `max_failed_rows` allows; true while unpublished."""
        limit = self.job.max_failed_rows
        return self.manifest is None or limit is None or num_failed(self.manifest) <= limit

    def sentence(self) -> str:
        """One line without any text of the rows."""
        if self.manifest is None:
            found = run_status(self.store, cache=self.commit_cache)
            missing = found.num_shards - found.num_committed
            first = next(iter(sorted(self.exhausted.items())), None)
            why = f" (shard {first[0]:05d}: {first[1]})" if first else ""
            return (
                f"{self.store.uri}: {missing} of {found.num_shards} shards could not be finished"
                f"{why}; the rest is committed, run the same again to go on"
            )
        counts = ", ".join(f"{count} {state}" for state, count in self.manifest.counts.items())
        said = f"{self.store.uri}: published, {self.manifest.num_rows} rows: {counts or 'none'}"
        if self.is_within_limit:
            return said
        failed, limit = num_failed(self.manifest), self.job.max_failed_rows
        return f"{said}; {failed} rows failed, max_failed_rows allows {limit}"


def plainly(name: str, work: Callable[[], T]) -> T:
    """Run a step in this process, unseen."""
    return work()


def nobody_looks(run_id: str) -> OnLook | None:
    """Show nothing but the progress this process keeps."""
    return None


def generate(
    job: RunConfig,
    *,
    progress: Progress,
    should_stop: StopSignal,
    step: Step = plainly,
    drainer: Drainer | None = None,
    run_shard: RunShard = Replica.finish_shard,
    watched: Watched = nobody_looks,
) -> Ended:
    """Plan a job, or take its run up again; drain every shard; publish.

    Args:
        job: The job.
        progress: Counters to keep.
        should_stop: Ends the work with `Stopped`, leases released.
        step: Shows a step.
        drainer: Brings up replicas elsewhere; by default this process is one.
        run_shard: What runs one shard when this process is a replica.
        watched: Given the run id, returns what shows each look at the run.

    Raises:
        StorageError, InferenceError: before any shard, what is wrong and what to change.
        Broken: the same, with some shards committed.
        Stopped: `should_stop` was set.
    """
    with scratch_folder() as work_dir:
        run = step("plan", lambda: prepare(job, work_dir=work_dir, progress=progress))
        try:
            with _breakable(run):
                progress.phase = "looking for what is committed"
                reveal_all(run.store, run.commits())
                if drainer is None:
                    try_canary(run, progress=progress)
                report = DrainReport()
                on_look = watched(run.record.run_id)
                every_s = EVERY_S if on_look is None else LOOK_EVERY_S
                cache = run.commit_cache
                with watching(run.store, progress, cache=cache, every_s=every_s, on_look=on_look):
                    if drainer is not None:
                        report.exhausted = dict(drainer(run))
                    else:
                        report = run_replicas(
                            run, progress=progress, should_stop=should_stop, run_shard=run_shard
                        )
                manifest = step("publish", lambda: finish(run.store, progress, cache=cache))
        finally:
            run.close()
    return _ended(run, report, manifest)


def redo(
    job: RunConfig,
    store: ObjectStore,
    *,
    progress: Progress,
    should_stop: StopSignal,
    step: Step = plainly,
    drainer: Drainer | None = None,
    run_shard: RunShard = Replica.finish_shard,
) -> Ended:
    """Finish what a run lacks, redo its failed rows in place, publish again.

    Parameters and errors are those of `generate`.
    """
    with scratch_folder() as work_dir:
        run = attach(
            job,
            read_record(store),
            store,
            work_dir=work_dir,
            progress=progress,
            is_replica=drainer is None,
        )
        try:
            with _breakable(run):
                report = DrainReport()
                if drainer is not None:
                    report.exhausted = dict(drainer(run))
                else:
                    invocation = new_invocation()
                    exempt(store, invocation)
                    report = drain(
                        run,
                        invocation=invocation,
                        progress=progress,
                        should_stop=should_stop,
                        run_shard=run_shard,
                        failed_rows=True,
                    )
                manifest = step("publish", lambda: finish(store, progress, cache=run.commit_cache))
        finally:
            run.close()
    return _ended(run, report, manifest)


def _ended(run: Run, report: DrainReport, manifest: RunManifest | None) -> Ended:
    return Ended(
        job=run.job,
        store=run.store,
        exhausted=report.exhausted,
        manifest=manifest,
        is_cancelled=report.is_cancelled,
        commit_cache=run.commit_cache,
    )
