"""The flow `batch-generate`: plan, drain every shard, publish. Running it again resumes the run.

Prefect sees a job file's path, a run folder and shard numbers: never a row, never prompt text.
"""

from functools import partial
from typing import Any

from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run

from flows.artifacts import RunArtifacts
from flows.config import load_job
from flows.fleet import stop_replicas_of
from flows.provisioning import drain_elsewhere
from flows.served import check_paths
from flows.stopping import stop_on_sigterm
from flows.task_runs import as_state, as_task_run, ended_state, shard_as_task_run
from tasks.orchestrate import Ended, generate
from tasks.progress import Progress
from tasks.stop import Stopped, StopSignal
from tasks.watch import OnLook


def stop_replicas(flow: Any, flow_run: Any, state: Any) -> None:
    """Hook: no replica outlives the flow run that started it."""
    stop_replicas_of(str(flow_run.id))


@flow(
    name="batch-generate",
    persist_result=False,
    on_cancellation=[stop_replicas],
    on_crashed=[stop_replicas],
)
def batch_generate(job: str, overrides: list[str] | None = None) -> Any:
    """Generate a completion for every row of a job; the same job again does what is missing.

    Args:
        job: Path of a job file as the worker sees it, or `s3://bucket/key`.
        overrides: Settings as `key=value`, such as `sampling.max_tokens=64`.

    Returns:
        A state whose message says in one line how the run ended; Failed when it is not published.
    """
    with stop_on_sigterm() as stop:
        progress = Progress()
        return as_state(
            lambda: _generate(job, overrides or [], progress, stop, notes=progress, is_served=True),
            ended_state,
        )


def generate_here(
    job: str, overrides: list[str], *, progress: Progress, should_stop: StopSignal
) -> Ended:
    """Run the same flow in this process, seen by the configured Prefect API.

    Raises:
        Exception: whatever ended the flow, as it was raised.
    """
    ended: list[Ended] = []
    errors: list[BaseException] = []

    def body(stop: StopSignal) -> Ended:
        try:
            ended.append(_generate(job, overrides, progress, stop, is_served=False))
        except BaseException as error:
            errors.append(error)
            raise
        return ended[0]

    @flow(
        name="batch-generate",
        persist_result=False,
        on_cancellation=[stop_replicas],
        on_crashed=[stop_replicas],
    )
    def batch_generate(job: str, overrides: list[str]) -> Any:
        with stop_on_sigterm(should_stop) as stop:
            return as_state(lambda: body(stop), ended_state)

    try:
        batch_generate(job, overrides, return_state=True)
    except TerminationSignal:
        raise Stopped from None
    if errors:
        raise errors[0]
    return ended[0]


def _generate(
    job: str,
    overrides: list[str],
    progress: Progress,
    should_stop: StopSignal,
    *,
    notes: Progress | None = None,
    is_served: bool,
) -> Ended:
    # The day that `{date}` means is the night's own, also when the flow run starts late.
    config = load_job(job, overrides=overrides, now=flow_run.scheduled_start_time)
    if is_served:
        check_paths(config)
    is_here = config.hardware.provider == "local"
    artifacts: list[RunArtifacts] = []

    def watched(run_id: str) -> OnLook:
        artifacts.append(RunArtifacts(run_id, notes))
        return artifacts[0].show

    ended = generate(
        config,
        progress=progress,
        should_stop=should_stop,
        step=as_task_run,
        drainer=None
        if is_here
        else partial(drain_elsewhere, should_stop=should_stop, progress=progress),
        run_shard=shard_as_task_run(progress),
        watched=watched,
    )
    for shown in artifacts:
        shown.finish(ended.store)
    return ended
