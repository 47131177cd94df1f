"""How work shows in Prefect: steps and shards as task runs, faults as one line.

Nothing goes through Prefect but names and states. Work is a closure: it has no parameters that Prefect
would record, its result stays in this process, and an exception becomes a state with one line, because
a traceback may quote what it was working on.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from prefect import State, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed

from flows.config import JobError
from flows.console import progress_line
from inference.errors import InferenceError
from storage.errors import StorageError
from tasks.budget import BudgetSpent
from tasks.drain import DrainReport, RunShard
from tasks.job_variables import ProvisionError
from tasks.orchestrate import Ended
from tasks.progress import Progress
from tasks.replica import Outcome, Replica, ShardOutcome
from tasks.stop import Broken, Stopped
from tasks.unforeseen import told

T = TypeVar("T")

FAULTS = (JobError, StorageError, InferenceError, ProvisionError, Broken, BudgetSpent)
"""What the user can put right; their messages hold no text of the rows."""

_LINE_EVERY_S = 60.0


def as_task_run(
    task_run_name: str,
    work: Callable[[], T],
    *,
    name: str | None = None,
    state_of: Callable[[T], State[Any]] = lambda result: Completed(),
) -> T:
    """Run `work` as one task run; return or raise as it does.

    Args:
        task_run_name: Shown for this task run.
        work: What to do.
        name: Of the task; by default that of the task run.
        state_of: How the result shows.
    """
    results: list[T] = []
    errors: list[Exception] = []

    @task(
        name=name or task_run_name,
        task_run_name=task_run_name,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def step() -> State[Any]:
        try:
            results.append(work())
        except Exception as error:  # raised again below, outside Prefect's hands
            errors.append(error)
            return _stopped() if isinstance(error, Stopped) else _failed(error)
        return state_of(results[0])

    step(return_state=True)
    if errors:
        raise errors[0]
    return results[0]


def shard_as_task_run(progress: Progress) -> RunShard:
    """Return what runs each shard as a task run `shard-00042`, and logs a line a minute."""
    shown_at = time.monotonic()

    def run_shard(replica: Replica, shard_id: int) -> ShardOutcome:
        nonlocal shown_at
        outcome = as_task_run(
            f"shard-{shard_id:05d}",
            lambda: replica.finish_shard(shard_id),
            name="generate-shard",
            state_of=_shard_state,
        )
        if time.monotonic() - shown_at > _LINE_EVERY_S:
            shown_at = time.monotonic()
            get_run_logger().info(progress_line(progress.snapshot()))
        return outcome

    return run_shard


def as_state(work: Callable[[], T], state_of: Callable[[T], State[Any]]) -> State[Any]:
    """Run a flow's body and say how it ended in one line."""
    try:
        return state_of(work())
    except Stopped:
        return _stopped()
    except Exception as error:
        return _failed(error)


def ended_state(ended: Ended) -> State[Any]:
    """How a start of a run shows: Failed when it is not published as the job allows."""
    if ended.is_cancelled and ended.manifest is None:
        return _stopped()
    is_good = ended.manifest is not None and ended.is_within_limit
    return (Completed if is_good else Failed)(message=ended.sentence())


def drained_state(report: DrainReport) -> State[Any]:
    """How a replica shows: Failed when it gave shards up."""
    if report.is_cancelled:
        return _stopped()
    counts = ", ".join(f"{count} {outcome}" for outcome, count in report.outcomes.items())
    if not report.exhausted:
        return Completed(message=f"shards: {counts or 'none left'}")
    shard_id, error = min(report.exhausted.items())
    given_up = f"{len(report.exhausted)} given up, first {shard_id:05d}: {error}"
    return Failed(message=f"shards: {counts or 'none'}; {given_up}")


def _shard_state(outcome: ShardOutcome) -> State[Any]:
    if outcome.outcome is Outcome.FAILED:
        return Failed(message=f"shard {outcome.shard_id:05d}: {outcome.error}")
    return Completed(message=outcome.outcome.value)


def _stopped() -> State[Any]:
    return Cancelled(message="stopped; leases are released, run the same again to go on")


def _failed(error: Exception) -> State[Any]:
    if isinstance(error, FAULTS):
        return Failed(message=str(error))
    return Failed(message=told(error))
