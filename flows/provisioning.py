"""From a planned run and `hardware.provider` to a fleet of replicas, sized and checked before any GPU."""

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

from prefect import get_client
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.fleet import PrefectFleet, patiently
from storage.records import num_unanswered
from tasks.cancel import exempt
from tasks.deadline import deadline_at
from tasks.drain import new_invocation
from tasks.follow import follow_env
from tasks.launch import device_env, num_replicas
from tasks.progress import Progress
from tasks.provision import Provider, ReplicaLaunch, launch_of, unsized_launch_of
from tasks.run import Run
from tasks.sizing import choose
from tasks.stop import StopSignal
from tasks.try_canary import CanaryVerdict
from tasks.waves import Limits, drain_by_waves, exhausted, one_wave

_DEFAULT_MAX_REPLICAS = 8


def drain_elsewhere(run: Run, *, should_stop: StopSignal, progress: Progress) -> Mapping[int, str]:
    """Drain a run by replicas on its provider's work pool; return the shards given up, with why.

    Where the job has a canary, one replica runs it before there is another.

    Raises:
        ProvisionError, EngineConfigError: before anything is started.
        CanaryFailed, BadInput: the canary broke a limit, or shows that the run is over its budget.
        Stopped: `should_stop` was set; the replicas are stopped.
    """
    invocation = new_invocation()
    exempt(run.store, invocation)
    fleet, limits = _fleet(run, invocation, failed_rows=False)
    return drain_by_waves(
        run,
        fleet,
        invocation=invocation,
        limits=limits,
        should_stop=should_stop,
        may_grow=CanaryVerdict(run, progress).is_good,
    )


def redo_elsewhere(run: Run, *, should_stop: StopSignal) -> Mapping[int, str]:
    """Redo failed rows, and what is missing, by one wave of replicas; raises as `drain_elsewhere`."""
    invocation = new_invocation()
    exempt(run.store, invocation)
    commits = run.commits()
    max_attempts = run.job.shards.max_attempts
    todo = [
        s
        for s in run.shards
        if s.shard_id not in commits or num_unanswered(commits[s.shard_id].counts)
    ]
    if todo:
        fleet, limits = _fleet(run, invocation, failed_rows=True)
        one_wave(
            run,
            fleet,
            count=min(limits.replicas, len(todo)),
            invocation=invocation,
            poll_s=limits.poll_s,
            should_stop=should_stop,
        )
    missing = [shard.shard_id for shard in run.shards if shard.shard_id not in run.commits()]
    return exhausted(run, missing, invocation, max_attempts) if missing else {}


def _fleet(run: Run, invocation: str, *, failed_rows: bool) -> tuple[PrefectFleet, Limits]:
    seconds_left = _seconds_left(run)
    launch, replicas = _sized(run, seconds_left)
    parameters = {
        "run_uri": run.uri,
        "invocation": invocation,
        "endpoint_url": run.job.storage.endpoint_url,
        "region": run.job.storage.region,
        "profile": run.job.storage.profile,
        "budget_minutes": run.job.hardware.replica_minutes,
        "failed_rows": failed_rows,
    }

    fleet = PrefectFleet(
        deployment=launch.deployment,
        parameters=parameters,
        run_id=run.record.run_id,
        parent_id=str(flow_run.id),
        job_variables=lambda index: variables_of_replica(run, launch, index % replicas),
    )
    limits = Limits(
        replicas=replicas,
        max_replicas=_max_replicas(run, launch.deployment, at_least=replicas),
        max_attempts=run.job.shards.max_attempts,
        seconds_left=seconds_left,
        poll_s=float(os.environ.get("NIGHTJAR_WAVE_POLL_S", "10")),
    )
    return fleet, limits


def variables_of_replica(run: Run, launch: ReplicaLaunch, index: int) -> dict[str, Any]:
    """Return the job variables of one of a run's replicas: its devices, or what its further hosts need to know."""
    variables = launch.job_variables
    env: Mapping[str, str] = {}
    if _is_process(run):
        env = device_env(run, index)
    elif variables.get("num_hosts", 1) > 1:
        env = follow_env(run)
    return {**variables, "env": {**variables.get("env", {}), **env}} if env else variables


def _sized(run: Run, seconds_left: float) -> tuple[ReplicaLaunch, int]:
    """Return how one replica is started, and how many are wanted."""
    provider = cast("Provider", run.job.hardware.provider)
    placement = run.job.hardware.placement
    if provider == "process" or run.backend == "dummy":
        # Processes on this machine take what it has; without a model there is nothing to size.
        return unsized_launch_of(provider, placement), num_replicas(run)
    deadline_s = None if seconds_left == float("inf") else max(60.0, seconds_left)
    tier, gpu = choose(run, deadline_s=deadline_s)
    get_run_logger().info("%s: %s", tier.label, tier.reason)
    stage_to = run.job.hardware.stage_to
    launch = launch_of(
        tier,
        gpu,
        provider=provider,
        weight_file_bytes=run.model.num_weight_bytes,
        stage_to="shm" if stage_to == "/dev/shm" else "auto",
        placement=placement,
    )
    replicas = 1 if run.job.storage.allow_single_writer else tier.replicas
    return launch, min(replicas, run.plan.num_shards)


def _seconds_left(run: Run) -> float:
    if run.job.deadline is None:
        return float("inf")
    now = datetime.now(UTC)
    started = flow_run.scheduled_start_time or now
    until = deadline_at(run.job.deadline, start=started, timezone=run.job.timezone)
    return (until - now).total_seconds()


def _max_replicas(run: Run, deployment: str, *, at_least: int) -> int:
    if run.job.storage.allow_single_writer:
        return 1
    if run.job.hardware.max_replicas != "auto":
        return max(at_least, run.job.hardware.max_replicas)

    def read() -> int | None:
        with get_client(sync_client=True) as client:
            pool_name = client.read_deployment_by_name(deployment).work_pool_name
            return None if pool_name is None else client.read_work_pool(pool_name).concurrency_limit

    return max(at_least, patiently(read) or _DEFAULT_MAX_REPLICAS)


def _is_process(run: Run) -> bool:
    return run.job.hardware.provider == "process"
