"""Replicas on this machine: this process is one, the others are children that join the run.

Children are ordinary `nightjar drain RUN` processes, one per device; they are stopped by their own
process id when this one stops, and by themselves when it dies: a device must be free for the next
start. Their failures cost nothing but time.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.cancel import exempt
from tasks.drain import DrainReport, RunShard, drain, new_invocation
from tasks.progress import Progress
from tasks.ranks import RANKS_VARIABLE, num_devices, num_ranks
from tasks.replica import Replica
from tasks.run import Run
from tasks.stop import Stopped, StopSignal

log = logging.getLogger("nightjar.launch")

_POLL_S = 1.0
_STOP_GRACE_S = 30.0


def run_replicas(
    run: Run,
    *,
    progress: Progress,
    should_stop: StopSignal,
    run_shard: RunShard = Replica.finish_shard,
) -> DrainReport:
    """Drain the run with as many local replicas as the job asks for; wait for shards others hold.

    Args:
        run: The planned run.
        progress: Counters to keep.
        should_stop: Ends the drain with `Stopped`.
        run_shard: What runs one shard in this process; see `tasks.drain.drain`.

    Returns:
        This process's report; `exhausted` has the shards nobody could finish.
    """
    invocation = new_invocation()
    exempt(run.store, invocation)
    with _children(run, invocation, num_replicas(run) - 1) as children:
        while True:
            report = drain(
                run,
                invocation=invocation,
                progress=progress,
                should_stop=should_stop,
                run_shard=run_shard,
            )
            missing = run.plan.num_shards - len(run.commits())
            if missing <= len(report.exhausted) or report.is_cancelled:
                return report
            if should_stop.is_set():
                raise Stopped
            alive = sum(child.poll() is None for child in children)
            progress.phase = f"waiting for {missing} shards held by {alive or 'other'} replicas"
            time.sleep(_POLL_S)


def num_replicas(run: Run) -> int:
    """Return how many replicas this machine runs: one per visible GPU, one on a CPU."""
    wanted = run.job.hardware.replicas
    if wanted != "auto":
        return max(1, min(wanted, run.plan.num_shards))
    if run.job.storage.allow_single_writer or run.backend == "dummy":
        return 1
    return max(1, min(num_devices() // num_ranks(run), run.plan.num_shards))


@contextmanager
def _children(run: Run, invocation: str, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    children = [_start(run, invocation, index + 1) for index in range(count)]
    try:
        yield children
    finally:
        for child in children:
            _stop(child)


def _start(run: Run, invocation: str, index: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flows.cli", "drain", run.uri, "--json"]
    command += ["--invocation", invocation, "--with-parent"]
    if run.job.storage.endpoint_url:
        command += ["--endpoint-url", run.job.storage.endpoint_url]
    env = {**os.environ, **device_env(run, index), **_aws_env(run)}
    # Its own session: a Ctrl-C in the terminal reaches this process, which stops its children.
    # Its standard input stays open as long as this process lives: that is how it learns.
    return subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def device_env(run: Run, index: int) -> dict[str, str]:
    """Return what gives a replica of this machine its own devices; empty when there are too few."""
    if run.backend == "dummy":
        return {}
    ranks = num_ranks(run)
    if num_devices() <= index * ranks:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = visible.split(",") if visible else [str(i) for i in range(num_devices())]
    devices = ",".join(every[index * ranks : (index + 1) * ranks])
    env = {"CUDA_VISIBLE_DEVICES": devices}
    if run.job.engine.tensor_parallel_size == "auto":
        env[RANKS_VARIABLE] = str(ranks)  # fewer devices must not be sized anew
    return env


def _aws_env(run: Run) -> dict[str, str]:
    storage = run.job.storage
    named = {"AWS_REGION": storage.region, "AWS_PROFILE": storage.profile}
    return {name: value for name, value in named.items() if value}


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdin is not None:
        child.stdin.close()
    if child.returncode not in (0, 3, -signal.SIGTERM, 128 + signal.SIGTERM):
        log.warning("replica process %d ended with exit code %d", child.pid, child.returncode)
