"""Tier -> the Prefect deployment of one replica and its job variables; pure, and checked before use.

A work pool is a way to get machines; its base job template names the variables it reads. Prefect
drops a variable the template does not name without a word, so `tasks.job_variables` refuses it first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from inference.hardware import GpuType
from inference.tier import Tier
from tasks.gpu_products import instance_types, node_choice
from tasks.job_variables import ProvisionError

Provider = Literal["process", "kubernetes", "ecs", "command"]

DEPLOYMENTS: dict[str, str] = {
    "process": "generate-shards/replica",
    "kubernetes": "generate-shards/kubernetes",
    "ecs": "generate-shards/ecs",
    "command": "generate-shards/command",
}

GIB = 2**30
MIB = 2**20

# Host memory beside the weights: the process, the rows in flight, and pinned buffers for each GPU.
BASE_MEMORY_BYTES = 16 * GIB
MEMORY_BYTES_PER_GPU = 4 * GIB
CPUS_PER_GPU = 4

# /dev/shm without weights in it: NCCL's buffers. With weights: their size, tokenizer and slack.
SHM_BYTES = 8 * GIB
SHM_SLACK = 1.02

# Where the templates mount the NVMe, and the variable that sends staging there.
WEIGHTS_FOLDER = "/weights"
CACHE_VARIABLE = "NIGHTJAR_CACHE"

# Share of a host's memory that staged weights may take before NVMe is used instead.
STAGE_MEMORY_SHARE = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What the owner of the platform fixes; the tier decides the rest."""

    image: str | None = None
    """Container image of replicas; null: the pool's own."""

    node_selector: Mapping[str, str] | None = None
    """Kubernetes: replaces the selector by GPU product."""

    weights_host_path: str | None = None
    """Folder on the node's NVMe; without one Kubernetes gives the pod a volume of its own."""

    launcher: str = ""
    """Command provider: a prefix such as `srun --gres=gpu:{gpus} --mem={memory_mib}M`."""

    env: Mapping[str, str] = field(default_factory=dict)
    """Environment of replicas. No credentials: it is recorded."""

    job_variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the pool's template, taken as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLaunch:
    """One replica as Prefect starts it: `run_deployment(deployment, job_variables=...)`."""

    deployment: str
    job_variables: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Needs:
    """What one host of a replica needs."""

    gpus: int
    hosts: int
    memory_bytes: int
    shm_bytes: int
    nvme_bytes: int
    """0 when the weights are staged to /dev/shm."""


def launch_of(
    tier: Tier,
    gpu: GpuType,
    *,
    provider: Provider,
    weight_file_bytes: int,
    stage_to: Literal["auto", "shm", "nvme"] = "auto",
    placement: Placement | None = None,
) -> ReplicaLaunch:
    """Say how to start one of the tier's replicas; `weight_file_bytes` is the checkpoint on disk.

    Raises:
        ProvisionError: the provider cannot give what the tier needs.
    """
    placement = placement or Placement()
    needs = _needs(tier, gpu, weight_file_bytes, stage_to)
    build = {
        "process": _process,
        "kubernetes": _kubernetes,
        "ecs": _ecs,
        "command": _command,
    }[provider]
    return _placed(provider, build(tier, needs, placement), placement)


def unsized_launch_of(provider: Provider, placement: Placement) -> ReplicaLaunch:
    """Say how to start a replica that no tier was chosen for; the pool's template has the sizes.

    Raises:
        ProvisionError: the launcher cannot be filled in.
    """
    variables: dict[str, Any] = {}
    if provider == "command":
        variables["launcher"] = _filled(placement.launcher, gpus=0, hosts=1, memory_bytes=GIB)
    if provider == "kubernetes" and placement.node_selector is not None:
        variables["node_selector"] = dict(placement.node_selector)
    return _placed(provider, variables, placement)


def _placed(provider: Provider, variables: dict[str, Any], placement: Placement) -> ReplicaLaunch:
    """Add what the owner of the platform fixes whatever the tier is."""
    given = dict(placement.job_variables)
    env = {**variables.get("env", {}), **placement.env, **given.pop("env", {})}
    if env:
        variables["env"] = env
    if placement.image is not None and provider in ("kubernetes", "ecs"):
        variables["image"] = placement.image
    return ReplicaLaunch(deployment=DEPLOYMENTS[provider], job_variables={**variables, **given})


def _needs(tier: Tier, gpu: GpuType, weight_file_bytes: int, stage_to: str) -> _Needs:
    ranks = tier.tensor_parallel_size if tier.offload == "none" else tier.num_gpus
    hosts = math.ceil(ranks / gpu.gpus_per_host)
    gpus = ranks // hosts
    in_memory = math.ceil(weight_file_bytes * SHM_SLACK)
    if stage_to == "auto":
        fits = in_memory <= STAGE_MEMORY_SHARE * gpu.host_memory_bytes * gpus
        # Offloaded weights fill the memory, or are wanted on NVMe in the first place.
        stage_to = "shm" if fits and tier.offload == "none" else "nvme"
    staged = in_memory if stage_to == "shm" else 0
    shm = SHM_BYTES + staged
    offloaded = weight_file_bytes if tier.offload == "cpu" else 0
    memory = BASE_MEMORY_BYTES + MEMORY_BYTES_PER_GPU * gpus + shm + offloaded
    nvme = 0 if staged else in_memory * (2 if tier.offload == "nvme" else 1)
    return _Needs(gpus=gpus, hosts=hosts, memory_bytes=memory, shm_bytes=shm, nvme_bytes=nvme)


def _process(tier: Tier, needs: _Needs, placement: Placement) -> dict[str, Any]:
    if needs.hosts > 1:
        raise ProvisionError(
            f"{tier.label} spans {needs.hosts} hosts and a process runs on one; "
            "use provider kubernetes or command, or a smaller tensor_parallel_size"
        )
    return {}


def _kubernetes(tier: Tier, needs: _Needs, placement: Placement) -> dict[str, Any]:
    nodes: dict[str, Any] = {"node_selector": dict(placement.node_selector or {})}
    if placement.node_selector is None and "node_selector" not in placement.job_variables:
        nodes = node_choice(tier.gpu)
    variables: dict[str, Any] = {
        "gpu_count": needs.gpus,
        "num_hosts": needs.hosts,
        "completion_mode": "Indexed" if needs.hosts > 1 else "NonIndexed",
        **nodes,
        "shm_size": _gib(needs.shm_bytes),
        "memory_request": _gib(needs.memory_bytes),
        "memory_limit": _gib(needs.memory_bytes),
        "cpu_request": str(CPUS_PER_GPU * needs.gpus),
        "env": {
            "NIGHTJAR_NUM_HOSTS": str(needs.hosts),
            "NIGHTJAR_GPUS_PER_HOST": str(needs.gpus),
            **({CACHE_VARIABLE: WEIGHTS_FOLDER} if needs.nvme_bytes else {}),
        },
    }
    if placement.weights_host_path is not None:
        source = {"path": placement.weights_host_path, "type": "Directory"}
        return {**variables, "weights_host_path": source}
    return {**variables, "weights_empty_dir": {"sizeLimit": _gib(needs.nvme_bytes + GIB)}}


def _ecs(tier: Tier, needs: _Needs, placement: Placement) -> dict[str, Any]:
    if needs.hosts > 1:
        raise ProvisionError(
            f"{tier.label} spans {needs.hosts} hosts and an ECS task runs on one; "
            "use provider kubernetes, or a smaller tensor_parallel_size"
        )
    constraints: list[dict[str, str]] = []
    if "placement_constraints" not in placement.job_variables:
        expression = f"attribute:ecs.instance-type =~ {instance_types(tier.gpu)}"
        constraints = [{"type": "memberOf", "expression": expression}]
    variables: dict[str, Any] = {
        "gpu_count": str(needs.gpus),
        "cpu": 1024 * CPUS_PER_GPU * needs.gpus,
        "memory": math.ceil(needs.memory_bytes / MIB),
        "shm_mib": math.ceil(needs.shm_bytes / MIB),
        "placement_constraints": constraints,
        "env": {CACHE_VARIABLE: WEIGHTS_FOLDER} if needs.nvme_bytes else {},
    }
    if placement.weights_host_path is not None:
        variables["nvme_path"] = placement.weights_host_path
    return variables


def _command(tier: Tier, needs: _Needs, placement: Placement) -> dict[str, Any]:
    if needs.hosts > 1 and "{hosts}" not in placement.launcher:
        raise ProvisionError(
            f"{tier.label} spans {needs.hosts} hosts and the launcher takes no {{hosts}}; "
            "write it as in `srun --nodes={hosts} --gres=gpu:{gpus}`"
        )
    launcher = _filled(
        placement.launcher, gpus=needs.gpus, hosts=needs.hosts, memory_bytes=needs.memory_bytes
    )
    return {"gpu_count": needs.gpus, "launcher": launcher}


def _filled(launcher: str, *, gpus: int, hosts: int, memory_bytes: int) -> str:
    values = {
        "gpus": gpus,
        "hosts": hosts,
        "memory_mib": math.ceil(memory_bytes / MIB),
        "cpus": CPUS_PER_GPU * max(1, gpus),
    }
    try:
        return launcher.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise ProvisionError(
            f"launcher {launcher!r} cannot be filled in ({error}); "
            f"it may name {', '.join(f'{{{name}}}' for name in values)}"
        ) from error


def _gib(num_bytes: float) -> str:
    return f"{math.ceil(num_bytes / GIB)}Gi"
