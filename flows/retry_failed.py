"""The flow `retry-failed`: finish what a run lacks, redo its failed rows in place, publish again."""

from functools import partial
from typing import Any

from prefect import flow

from flows.batch_generate import stop_replicas
from flows.config import load_job
from flows.provisioning import redo_elsewhere
from flows.stopping import stop_on_sigterm
from flows.task_runs import as_state, as_task_run, ended_state, shard_as_task_run
from storage.object_store import StorageConfig
from tasks.orchestrate import Ended, redo
from tasks.progress import Progress
from tasks.run_folder import RunFolder, open_run
from tasks.stop import StopSignal


@flow(
    name="retry-failed",
    persist_result=False,
    on_cancellation=[stop_replicas],
    on_crashed=[stop_replicas],
)
def retry_failed(run_uri: str, endpoint_url: str | None = None, profile: str | None = None) -> Any:
    """Redo only what failed; whatever is answered stays as it is.

    Args:
        run_uri: The run folder.
        endpoint_url: S3 endpoint for stores that are not AWS; default: the run's.
        profile: Named profile in the worker's AWS configuration files; default: the run's.

    Returns:
        A state whose message says in one line how the run stands now.
    """
    with stop_on_sigterm() as stop:
        given = StorageConfig(endpoint_url=endpoint_url, profile=profile)
        return as_state(lambda: _redo(open_run(run_uri, given), stop), ended_state)


def _redo(found: RunFolder, should_stop: StopSignal) -> Ended:
    store, record = found
    job = load_job(record.job)
    progress = Progress()
    is_here = job.hardware.provider == "local"
    return redo(
        job,
        store,
        progress=progress,
        should_stop=should_stop,
        step=as_task_run,
        drainer=None if is_here else partial(redo_elsewhere, should_stop=should_stop),
        run_shard=shard_as_task_run(progress),
    )
