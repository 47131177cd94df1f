"""How many ranks one replica has, and how those of several hosts find each other."""

import dataclasses
import os

from inference.config import DistributedConfig
from tasks.choose_tier import HERE, choose_hardware
from tasks.job import RunConfig
from tasks.run import Run
from tasks.sizing import planned_workload

RANKS_VARIABLE = "NIGHTJAR_NUM_RANKS"
"""Set for replicas started by another one, which has sized them."""

HOSTS_VARIABLE, LEADER_VARIABLE = "NIGHTJAR_NUM_HOSTS", "NIGHTJAR_LEADER"
"""Set in the pods of a replica that spans hosts; see `tasks.follow`."""

RENDEZVOUS_PORT = 29500


def num_ranks(run: Run) -> int:
    """Ranks of one replica of this run on this machine; `auto` is what the sizing says of its devices."""
    job = run.job
    if job.engine.tensor_parallel_size != "auto":
        return job.engine.tensor_parallel_size
    given = os.environ.get(RANKS_VARIABLE)
    if given:
        return int(given)
    if run.backend not in ("paged", "zero") or num_devices() < 2:
        return 1
    if job.hardware.provider not in HERE:
        # Whoever provided this place has sized it: all its devices are one replica's.
        return num_devices() * distributed_of(job).num_hosts
    workload = planned_workload(run.store)
    return choose_hardware(run.settled_job, str(run.model.path), workload).gpus_per_replica


def num_devices() -> int:
    """Devices this process may use."""
    import torch  # heavy, and only to count devices

    return torch.cuda.device_count()


def distributed_of(job: RunConfig) -> DistributedConfig:
    """Return how ranks reach each other: the job's settings, completed by the pod's."""
    settings = job.engine.distributed
    hosts, leader = os.environ.get(HOSTS_VARIABLE, "1"), os.environ.get(LEADER_VARIABLE)
    if settings.num_hosts == 1 and leader and int(hosts) > 1:
        return dataclasses.replace(
            settings, num_hosts=int(hosts), rendezvous=f"{leader}:{RENDEZVOUS_PORT}"
        )
    return settings
