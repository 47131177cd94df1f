"""Which hardware and which backend a job would run on, and why; a machine without a GPU says so."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from inference.backends import resolve_backend
from inference.config import Backend
from inference.errors import EngineConfigError, ModelError
from inference.hardware import GpuType, match_gpu
from inference.model_config import read_model_shape
from inference.tier import Options, Tier
from inference.tier_choice import Objective
from inference.tiers import choose_tier, size_model
from inference.workload import Workload
from tasks.gpu_products import within_reach
from tasks.hardware import hardware_of
from tasks.job import RunConfig

HERE = ("local", "process")
"""Providers whose replicas run on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a run would have; `tier` is None where no GPU is involved, or none that can be sized."""

    backend: str
    device: str
    reason: str
    replicas: int = 1
    gpus_per_replica: int = 1
    price_per_hour: float | None = None
    tier: Tier | None = None

    def as_document(self) -> dict[str, Any]:
        """Return plain JSON values."""
        document = dataclasses.asdict(self)
        document["tier"] = None if self.tier is None else dataclasses.asdict(self.tier)
        return document


def choose_hardware(
    job: RunConfig,
    model_dir: str,
    workload: Workload,
    *,
    deadline_s: float | None = None,
) -> Choice:
    """Choose for a workload.

    Raises:
        EngineConfigError: nothing fits; with the arithmetic.
        ModelError: the model's config.json says too little to size it.
    """
    if job.engine.backend == "dummy":
        return _without_gpu(job, "dummy", "the dummy backend needs no model and no GPU")
    known, num_gpus = candidates(job)
    if not known:
        return _unsized(job)
    shape, options = read_model_shape(model_dir), sizing_options(job, num_gpus)
    objective: Objective = "fastest" if job.hardware.provider in HERE else "cheapest"
    # What is over the budget is shown all the same: the forecast says so, with the numbers.
    tier = size_model(
        shape,
        known,
        workload,
        options=options,
        deadline_s=deadline_s,
        budget_usd=job.budget.usd,
        objective=objective,
    ).best or choose_tier(shape, known, workload, options=options)
    gpu = next(gpu for gpu in known if gpu.name == tier.gpu)
    return Choice(
        backend=tier.backend,
        device=tier.gpu,
        reason=tier.reason,
        replicas=tier.replicas,
        gpus_per_replica=tier.num_gpus // tier.replicas,
        price_per_hour=gpu.price_per_hour,
        tier=tier,
    )


def settle_backend(job: RunConfig, model_dir: str | Path) -> RunConfig:
    """Return the job with its backend named: where it is `auto`, what the sizing says of the place of its replicas.

    Asked before anything is planned, and of what fits at all: a single short row.

    Raises:
        EngineConfigError: nothing fits; with the arithmetic.
    """
    if job.engine.backend != "auto":
        return job
    try:
        backend = choose_hardware(job, str(model_dir), Workload.of([(1, 1)])).backend
    except ModelError:  # of a kind that cannot be sized
        is_here = job.hardware.provider in HERE
        backend = resolve_backend("auto", job.engine.num_ranks) if is_here else "paged"
    engine = dataclasses.replace(job.engine, backend=cast("Backend", backend))
    return dataclasses.replace(job, engine=engine)


def candidates(job: RunConfig) -> tuple[list[GpuType], int | None]:
    """Return the GPU types a job may run on, at its price, and how many a replica has where the job names it.

    Raises:
        EngineConfigError: a type is wrong or not known, or one price is given for several types.
    """
    config = job.hardware
    known, num_gpus = hardware_of(config), None
    if config.provider in HERE:
        found = local_gpu(known)
        known = [] if found is None else [found]
    else:
        known, num_gpus = named_gpus(config.tier, known)
        if config.tier == "auto":
            fixed = config.placement.job_variables
            known = within_reach(
                known,
                config.provider,
                selector=config.placement.node_selector or fixed.get("node_selector"),
                is_placed="placement_constraints" in fixed,
            )
    price = config.price_per_hour
    if price is None:
        return known, num_gpus
    if len(known) > 1:
        names = ", ".join(gpu.name for gpu in known)
        raise EngineConfigError(
            f"hardware.price_per_hour is {price:g}, the price of one GPU type, and hardware.tier may choose among "
            f"{names}; name one in hardware.tier, or give each its price in hardware.file"
        )
    return [dataclasses.replace(gpu, price_per_hour=price) for gpu in known], num_gpus


def priced_hardware(job: RunConfig) -> list[GpuType]:
    """Return every GPU type that a job knows, those it may run on at its price. Raises as `candidates`."""
    at_price = {gpu.name: gpu.price_per_hour for gpu in candidates(job)[0]}
    return [
        dataclasses.replace(gpu, price_per_hour=at_price.get(gpu.name, gpu.price_per_hour))
        for gpu in hardware_of(job.hardware)
    ]


def local_gpu(known: list[GpuType]) -> GpuType | None:
    """Return the type of this machine's GPUs with their number; None without one that is known."""
    import torch  # heavy, and only to ask for devices

    count = torch.cuda.device_count()
    if not count:
        return None
    device = torch.cuda.get_device_properties(0)
    found = match_gpu(device.name, device.total_memory, known)
    return (
        None if found is None else dataclasses.replace(found, max_count=count, gpus_per_host=count)
    )


def sizing_options(job: RunConfig, num_gpus: int | None = None) -> Options:
    """Return what a job fixes of its tier; `num_gpus` a replica, where `hardware.tier` names it."""
    knobs, replicas = job.engine, job.hardware.replicas
    size = num_gpus if knobs.tensor_parallel_size == "auto" else knobs.tensor_parallel_size
    options = Options(
        dtype=job.model.dtype,
        quantizations=(job.model.quantization,),
        kv_cache_dtype=knobs.kv_cache_dtype,
        tensor_parallel_size=size,
        replicas=None if replicas == "auto" else replicas,
        backend="auto" if knobs.backend == "dummy" else knobs.backend,
    )
    seqs = knobs.max_num_seqs
    return options if seqs == "auto" else dataclasses.replace(options, max_num_seqs=seqs)


def named_gpus(tier: str, known: list[GpuType]) -> tuple[list[GpuType], int | None]:
    """Read `hardware.tier`: the GPU types to choose from, and how many GPUs a replica has if given.

    Raises:
        EngineConfigError: it names no known GPU type.
    """
    if tier == "auto":
        return known, None
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\S+)", tier.strip())
    gpus = [gpu for gpu in known if match and gpu.name == match[2]]
    if match is None or not gpus:
        names = ", ".join(gpu.name for gpu in known)
        raise EngineConfigError(
            f"hardware.tier: {tier!r} is no GPU type of the hardware file; use auto, one of {names}, "
            "or as in `4x H100`"
        )
    return gpus, int(match[1]) if match[1] else None


def _unsized(job: RunConfig) -> Choice:
    """The choice for this machine, where the hardware file knows none of its devices."""
    import torch  # heavy, and only to ask for devices

    backend = resolve_backend(job.engine.backend, job.engine.num_ranks)
    if not torch.cuda.is_available():
        return _without_gpu(
            job, backend, f"this machine has no GPU: the {backend} backend runs on the CPU"
        )
    name = torch.cuda.get_device_name()
    why = f"the hardware file does not know {name}: the {backend} backend runs on it, and nothing is foretold of it"
    return _without_gpu(job, backend, why, device=name)


def _without_gpu(job: RunConfig, backend: str, reason: str, *, device: str = "cpu") -> Choice:
    wanted = job.hardware.replicas
    return Choice(
        backend=backend,
        device=device,
        reason=reason,
        replicas=1 if wanted == "auto" else wanted,
        price_per_hour=job.hardware.price_per_hour,
    )
