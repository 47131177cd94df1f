"""The flow `batch-generate`: plan, drain every shard, publish. Running it again resumes the run.

Prefect sees a job file's path, a run folder and shard numbers: never a row, never prompt text.
"""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.config import load_job
from flows.generate_shards import generate_shards
from storage.object_store import StorageConfig, open_store
from tasks.progress import Progress
from tasks.run import finish, new_invocation, prepare
from tasks.scratch import scratch_folder
from tasks.status import run_status


class RunIncomplete(Exception):
    """Some shards could not be finished; the rest is committed and the run resumes."""


@flow(name="batch-generate", persist_result=False)
def batch_generate(job: str, overrides: list[str] | None = None) -> str:
    """Generate a completion for every row of a job; the same job again does what is missing.

    Args:
        job: Path of a job file as the worker sees it, or `s3://bucket/key`.
        overrides: Settings as `key=value`, such as `sampling.max_tokens=64`.

    Returns:
        The run folder.

    Raises:
        RunIncomplete: some shards could not be finished.
    """
    run_uri = plan_run(job, overrides or [])
    endpoint_url = load_job(job, overrides=overrides or []).storage.endpoint_url
    generate_shards(run_uri, invocation=new_invocation(), endpoint_url=endpoint_url)
    missing = publish_run(run_uri, endpoint_url)
    if missing:
        raise RunIncomplete(
            f"{run_uri}: {missing} shards could not be finished, the rest is committed; "
            "run the same job again to go on"
        )
    return run_uri


@task(name="plan", cache_policy=NO_CACHE, persist_result=False)
def plan_run(job: str, overrides: list[str]) -> str:
    """Check everything, write run.json and the plan; return the run folder."""
    config = load_job(job, overrides=overrides)
    with scratch_folder() as work_dir:
        run = prepare(config, work_dir=work_dir, progress=Progress())
        run.model.close()
        return run.uri


@task(name="publish", cache_policy=NO_CACHE, persist_result=False)
def publish_run(run_uri: str, endpoint_url: str | None) -> int:
    """Publish if every shard is committed; return how many are not."""
    store = open_store(run_uri, StorageConfig(endpoint_url=endpoint_url))
    if finish(store, Progress()) is not None:
        return 0
    found = run_status(store)
    return found.num_shards - found.num_committed
