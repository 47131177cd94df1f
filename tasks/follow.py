"""The further hosts of a replica that spans several: each stages the model itself, then joins the first one's ranks.

    python -m tasks.follow

Started by `deployments/entrypoint.sh` in every pod of an indexed Job but the first, which runs the flow. Nothing of
the first host's disk is needed: the model comes from the run's own source, and must be the one it was planned with.
"""

import json
import os
import signal
import sys
from types import FrameType

from inference.errors import InferenceError
from inference.launch import MODEL_VARIABLE, Launch, RankProcesses
from storage.errors import BadInput, StorageError
from storage.manifest import RunRecord
from storage.object_store import StorageConfig
from tasks.job import job_of
from tasks.model import open_model
from tasks.progress import Progress
from tasks.ranks import distributed_of
from tasks.run import Run
from tasks.run_folder import open_run

FOLLOW_VARIABLE = "NIGHTJAR_FOLLOW"
"""JSON: the run folder, and how its store is reached."""

GPUS_VARIABLE, INDEX_VARIABLE = "NIGHTJAR_GPUS_PER_HOST", "JOB_COMPLETION_INDEX"


def follow_env(run: Run) -> dict[str, str]:
    """What the further hosts of a replica of this run need in their environment, beside the tier's numbers."""
    storage = run.job.storage
    told = {
        "run_uri": run.uri,
        "endpoint_url": storage.endpoint_url,
        "region": storage.region,
        "profile": storage.profile,
    }
    return {FOLLOW_VARIABLE: json.dumps(told)}


def main() -> int:
    """Stage, join, and wait for the ranks to end; return their launcher's exit code, 2 where nothing was started."""
    signal.signal(signal.SIGTERM, _end)  # the first process of a container has no default action
    try:
        return follow(_record())
    except (StorageError, InferenceError) as error:
        print(f"nightjar: {error}", file=sys.stderr, flush=True)
        return 2


def follow(record: RunRecord) -> int:
    """Stage a planned run's model on this host, then run the host's ranks until they end.

    Raises:
        ModelError: it is not the model that the run was planned with.
        StorageError: it cannot be staged.
    """
    job = job_of(record)
    model = open_model(job, progress=Progress())
    try:
        model.expect(record.fingerprint_fields["model.content_id"])
        processes = RankProcesses(
            Launch(
                module="inference",
                num_ranks=int(os.environ[GPUS_VARIABLE]),
                distributed=distributed_of(job),
                host_rank=int(os.environ[INDEX_VARIABLE]),
                env={MODEL_VARIABLE: str(model.path)},
            ),
            sys.stdout.fileno(),
        )
        try:
            return processes.wait()
        finally:
            processes.stop()
    finally:
        model.close()


def _record() -> RunRecord:
    try:
        told = json.loads(os.environ[FOLLOW_VARIABLE])
        uri = told.pop("run_uri")
        given = StorageConfig(**told)
    except (KeyError, ValueError, TypeError) as error:
        raise BadInput(
            f"{FOLLOW_VARIABLE} is {os.environ.get(FOLLOW_VARIABLE)!r}: does not name a run; it is set by the flow "
            "that starts replicas over several hosts"
        ) from error
    return open_run(uri, given).record


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
