"""The flow `scan-inbox`: a letter for every dropped file within minutes, and a run for every good one.

Queueing is idempotent: the key is the file's name and content, so a scan repeats nothing, and a server
that lost its database is asked again.
"""

import dataclasses
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prefect import State, flow, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.logging import get_run_logger
from prefect.states import Completed, Scheduled

from flows.fleet import patiently
from flows.inbox_jobs import InboxJobs
from flows.served import check_paths
from flows.stopping import stop_on_sigterm
from flows.task_runs import as_state
from storage.object_store import open_store
from tasks.inbox import SETTLE_S, Scan, Submission, scan
from tasks.scratch import scratch_folder

DEPLOYMENT = "batch-generate/adhoc"
_MAX_TRIES = 3
"""Flow runs per submission that may crash; one that failed has said why and is left to `retry`."""


@flow(name="scan-inbox", persist_result=False)
def scan_inbox(
    inbox: str, job: str, endpoint_url: str | None = None, settle_s: float = SETTLE_S
) -> Any:
    """Look at an inbox once.

    Args:
        inbox: The prefix above `inbox/`, `accepted/`, `rejected/` and `done/`.
        job: Job file whose settings dropped files get; its `input.uri` is replaced.
        endpoint_url: S3 endpoint for stores that are not AWS; default: the job's.
        settle_s: How long a local file must have been left alone.

    Returns:
        A state whose message counts what was done; names of files only, no content.
    """
    with stop_on_sigterm():
        return as_state(lambda: _scan(inbox, job, endpoint_url, settle_s), _state)


def _scan(uri: str, job: str, endpoint_url: str | None, settle_s: float) -> Scan:
    jobs = InboxJobs.read(job)
    check_paths(jobs.any_job)
    storage = jobs.storage
    if endpoint_url is not None:
        storage = dataclasses.replace(storage, endpoint_url=endpoint_url)
    with scratch_folder() as work_dir:
        found = scan(
            open_store(uri, storage),
            storage=storage,
            jobs=jobs,
            work_dir=work_dir,
            now=datetime.now(UTC),
            settle_s=settle_s,
        )
    for submission in found.queued:
        _queue(submission)
    return found


def _queue(submission: Submission) -> None:
    """See to it that a flow run works on the submission, or will."""
    for attempt in range(_MAX_TRIES):
        flow_run = patiently(partial(_create, submission, attempt))
        if flow_run.state is None or not flow_run.state.is_crashed():
            return
    get_run_logger().warning(
        "submission %s: %d flow runs crashed; look at them, then run its job again",
        submission.submission_id,
        _MAX_TRIES,
    )


def _create(submission: Submission, attempt: int) -> FlowRun:
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
        return client.create_flow_run_from_deployment(
            deployment.id,
            parameters={"job": submission.job_uri},
            state=Scheduled(scheduled_time=submission.after or datetime.now(UTC)),
            name=submission.submission_id,
            tags=["nightjar", "inbox"],
            idempotency_key=f"inbox:{submission.submission_id}:{attempt}",
        )


def _state(found: Scan) -> State[Any]:
    counts = {
        "accepted": len(found.accepted),
        "rejected": len(found.rejected),
        "done": len(found.done),
        "still being written": len(found.waiting),
        "in work": len(found.queued),
    }
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return Completed(message=said or "nothing new")
