"""A model and a run's token counts to a sizing: what fits where, how fast, at what price."""

import re
from typing import NamedTuple

from inference.errors import EngineConfigError
from inference.hardware import GpuType
from inference.model_config import read_model_shape
from inference.roofline import Workload
from inference.tier import Options, Tier
from inference.tiers import DEFAULT_WORKLOAD, Sizing, choose_tier, size_model
from storage.errors import BadInput
from storage.object_store import ObjectStore
from tasks.hardware import load_hardware
from tasks.plan import load_plan
from tasks.run import Run, read_record


class Choice(NamedTuple):
    """What a run shall run on."""

    tier: Tier
    gpu: GpuType


def size(model: str, *, hardware: str | None = None, run: ObjectStore | None = None) -> Sizing:
    """Size a model folder on every GPU type of a hardware file, for a planned run's tokens if given.

    Raises:
        ModelError: config.json is missing or says too little.
        EngineConfigError: the hardware file is wrong.
        BadInput: `run` is not a planned run.
    """
    workload = DEFAULT_WORKLOAD if run is None else _workload(run)
    return size_model(read_model_shape(model), load_hardware(hardware), workload)


def choose(run: Run, hardware: str | None = None, *, deadline_s: float | None = None) -> Choice:
    """Choose the tier of a planned run for `hardware.tier`, its tokens, deadline and budget.

    Raises:
        EngineConfigError: nothing fits, or `hardware.tier` names no known GPU type.
        ModelError: config.json says too little.
    """
    job = run.job
    known = load_hardware(hardware)
    gpus, tensor_parallel_size = _named(job.hardware.tier, known)
    knobs = job.engine
    if knobs.tensor_parallel_size != "auto":
        tensor_parallel_size = knobs.tensor_parallel_size
    options = Options(
        dtype=job.model.dtype,
        quantizations=(job.model.quantization,),
        kv_cache_dtype=knobs.kv_cache_dtype,
        tensor_parallel_size=tensor_parallel_size,
        replicas=None if job.hardware.replicas == "auto" else job.hardware.replicas,
        backend=knobs.backend if knobs.backend in ("paged", "zero") else "auto",
        **({} if knobs.max_num_seqs == "auto" else {"max_num_seqs": knobs.max_num_seqs}),
    )
    tier = choose_tier(
        read_model_shape(str(run.model.path)),
        gpus,
        _workload(run.store),
        options=options,
        deadline_s=deadline_s,
        budget_usd=job.budget.usd,
    )
    return Choice(tier, next(gpu for gpu in gpus if gpu.name == tier.gpu))


def _named(tier: str, known: list[GpuType]) -> tuple[list[GpuType], int | None]:
    """Read `hardware.tier`: the GPU types to choose from, and how many GPUs a replica has if given."""
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


def _workload(run: ObjectStore) -> Workload:
    plan = load_plan(run)
    if plan is None:
        raise BadInput(f"{run.uri}: no plan.json; give a planned run's folder")
    max_tokens = read_record(run).fingerprint_fields["sampling.max_tokens"]
    num_sequences = max(1, (plan.num_rows - plan.num_bad_rows) * plan.num_samples)
    return Workload.from_totals(
        num_sequences,
        plan.num_prompt_tokens * plan.num_samples,
        num_sequences * max_tokens,
        max_completion_tokens=max_tokens,
    )
