"""The flow `generate-shards`: one replica. Stage, load once, drain shards until none is left.

One task run per shard. A task's body is the plain function that `nightjar run` calls too.
"""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.config import load_job
from storage.object_store import StorageConfig, open_store
from tasks.progress import Progress
from tasks.replica import Outcome, Replica, ShardOutcome
from tasks.run import attach, drain, read_record
from tasks.scratch import scratch_folder
from tasks.stop import StopSignal


class ShardFailed(Exception):
    """One attempt at one shard failed; the message carries no text of its rows."""


@flow(name="generate-shards", persist_result=False)
def generate_shards(
    run_uri: str, invocation: str, endpoint_url: str | None = None
) -> dict[str, str]:
    """Drain a planned run as one replica.

    Args:
        run_uri: The run folder.
        invocation: Shared by all replicas of one start; attempts are bounded within it.
        endpoint_url: S3 endpoint for stores that are not AWS.

    Returns:
        Shards given up, with the last error.
    """
    store = open_store(run_uri, StorageConfig(endpoint_url=endpoint_url))
    record = read_record(store)
    with scratch_folder() as work_dir:
        run = attach(load_job(record.job), record, store, work_dir=work_dir, progress=Progress())
        try:
            report = drain(
                run,
                invocation=invocation,
                progress=Progress(),
                should_stop=StopSignal(),
                run_shard=_as_task_run,
            )
        finally:
            run.model.close()
    return {f"{shard_id:05d}": error for shard_id, error in report.exhausted.items()}


def _as_task_run(replica: Replica, shard_id: int) -> ShardOutcome:
    # The replica is not a parameter: Prefect would walk through all it holds.
    @task(
        name="generate-shard",
        task_run_name=f"shard-{shard_id:05d}",
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def generate_shard(shard_id: int) -> str:
        done = replica.finish_shard(shard_id)
        if done.outcome is Outcome.FAILED:
            raise ShardFailed(f"shard {shard_id:05d}: {done.error}")
        return done.outcome.value

    try:
        return ShardOutcome(shard_id, Outcome(generate_shard(shard_id)))
    except ShardFailed as error:
        return ShardOutcome(shard_id, Outcome.FAILED, str(error))
