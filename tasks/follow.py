"""The further hosts of a replica that spans several: each stages the model itself, then joins the first one's ranks.

    python -m tasks.follow

Started by `deployments/entrypoint.sh` in every pod of an indexed Job but the first, which runs the flow. Nothing of
the first host's disk is needed: the model comes from the run's own source, and must be the one it was planned with.

Where a rank of any host is out of memory, all hosts' ranks end with that (`inference.rank_alarm`), and the first host
starts its own again with less. So do these, and meet it where they met before. They end for good on any other ending,
and if it does not come back within `engine.distributed.timeout_s` and a minute.
"""

import json
import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType

from inference.arriving import Arriving
from inference.backends.shrinking import MOST_SHRINKS
from inference.config import DistributedConfig
from inference.errors import InferenceError
from inference.launch import MODEL_VARIABLE, Launch, wait_until_gone
from inference.rank_exit import ExitCode
from inference.rank_files import FileNews
from inference.rank_group import RankGroup
from storage.errors import BadInput, StorageError
from storage.manifest import RunRecord
from storage.object_store import StorageConfig
from tasks.job import job_of
from tasks.model import open_model
from tasks.progress import Progress
from tasks.ranks import distributed_of
from tasks.run import Run
from tasks.run_folder import open_run

logger = logging.getLogger(__name__)

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


def main(*, module: str = "inference") -> int:
    """Stage, join, and wait for the ranks to end; return an exit code.

    Args:
        module: what each rank runs; another one must keep to what `inference.__main__` promises.

    Returns:
        The last launcher's, 6 where even a replica that was made smaller as often as it may is out of memory,
        2 where nothing was started.
    """
    signal.signal(signal.SIGTERM, _end)  # the first process of a container has no default action
    try:
        return follow(_record(), module)
    except (StorageError, InferenceError) as error:
        print(f"nightjar: {error}", file=sys.stderr, flush=True)
        return 2


def follow(record: RunRecord, module: str = "inference") -> int:
    """Stage a planned run's model on this host, then run the host's ranks until they end for good.

    Raises:
        ModelError: it is not the model that the run was planned with.
        StorageError: it cannot be staged.
    """
    job = job_of(record)
    model = open_model(job, progress=Progress())
    try:
        model.expect(record.fingerprint_fields["model.content_id"])
        return join(model.path, distributed_of(job), module)
    finally:
        model.close()


def join(folder: Path, distributed: DistributedConfig, module: str = "inference") -> int:
    """Run this host's ranks of the model in `folder` until they end, again after each end out of memory.

    Returns:
        As `main`.
    """
    launch = Launch(
        module=module,
        num_ranks=int(os.environ[GPUS_VARIABLE]),
        distributed=distributed,
        host_rank=int(os.environ[INDEX_VARIABLE]),
        env={MODEL_VARIABLE: str(folder)},
    )
    exit_code = _run(launch, folder)
    for _ in range(MOST_SHRINKS):
        if exit_code != ExitCode.OUT_OF_MEMORY:
            break
        logger.warning("out of memory: this host's ranks start again with the first host's")
        wait_until_gone(distributed.rendezvous)
        exit_code = _run(replace(launch, is_again=True), folder)
    return exit_code


def _run(launch: Launch, folder: Path) -> int:
    """Run ranks, all of whose files are there, to their end; return what `RankGroup.wait` does."""
    group = RankGroup(launch, {}, output=sys.stdout.fileno())
    try:
        for message in FileNews(Arriving.whole(folder)).since_last():
            group.tell(message)
        return group.wait()
    finally:
        group.close()


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
