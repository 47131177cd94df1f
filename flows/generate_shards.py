"""The flow `generate-shards`: one replica. Stage, load once, drain shards until none is left.

One task run per shard. A task's body is the plain function that `nightjar run` calls too.
"""

import math
from typing import Any

from prefect import flow

from flows.config import load_job
from flows.stopping import stop_on_sigterm
from flows.task_runs import as_state, drained_state, shard_as_task_run
from storage.object_store import StorageConfig
from tasks.drain import DrainReport, drain
from tasks.progress import Progress
from tasks.run import attach
from tasks.run_folder import RunFolder, open_run
from tasks.scratch import scratch_folder
from tasks.stop import StopSignal
from tasks.try_canary import try_canary


@flow(name="generate-shards", persist_result=False)
def generate_shards(
    run_uri: str,
    invocation: str,
    endpoint_url: str | None = None,
    region: str | None = None,
    profile: str | None = None,
    budget_minutes: float | None = None,
    failed_rows: bool = False,
) -> Any:
    """Drain a planned run as one replica.

    Args:
        run_uri: The run folder.
        invocation: Shared by all replicas of one start; attempts are bounded within it.
        endpoint_url: S3 endpoint for stores that are not AWS.
        region: Of the store.
        profile: Named profile in this machine's AWS configuration files.
        budget_minutes: No further shard is claimed after this long.
        failed_rows: Also redo rows without an answer, in new revisions of their shards.

    Returns:
        A state whose message counts the shards; Failed when this replica gave shards up.
    """
    with stop_on_sigterm() as stop:
        given = StorageConfig(endpoint_url=endpoint_url, region=region, profile=profile)
        budget_s = math.inf if budget_minutes is None else budget_minutes * 60
        return as_state(
            lambda: _drain(open_run(run_uri, given), invocation, budget_s, failed_rows, stop),
            drained_state,
        )


def _drain(
    found: RunFolder, invocation: str, budget_s: float, failed_rows: bool, should_stop: StopSignal
) -> DrainReport:
    store, record = found
    progress = Progress()
    with scratch_folder() as work_dir:
        run = attach(load_job(record.job), record, store, work_dir=work_dir, progress=progress)
        try:
            # One of the first replicas finds it undecided; the others find its verdict.
            try_canary(run, progress=progress)
            return drain(
                run,
                invocation=invocation,
                progress=progress,
                should_stop=should_stop,
                budget_s=budget_s,
                failed_rows=failed_rows,
                run_shard=shard_as_task_run(progress),
            )
        finally:
            if (unused := run.take_backend()) is not None:
                unused.close()
            run.close()
