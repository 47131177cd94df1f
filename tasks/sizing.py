"""A model and a run's token counts to a sizing: what fits where, how fast, at what price."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from inference.hardware import GpuType
from inference.model_config import read_model_shape
from inference.tier import Tier
from inference.tiers import Sizing, choose_tier, size_model
from inference.workload import Workload
from storage.errors import BadInput
from storage.object_store import ObjectStore
from tasks.choose_tier import candidates, sizing_options
from tasks.job import job_of
from tasks.run import Run
from tasks.run_forecast import expected_workload
from tasks.run_record import load_plan, read_record


class Choice(NamedTuple):
    """What a run shall run on."""

    tier: Tier
    gpu: GpuType


def size(model: str | Path, workload: Workload, known: Sequence[GpuType]) -> Sizing:
    """Size a model folder on every GPU type known, for a workload's tokens.

    Raises:
        ModelError: config.json is missing or says too little.
    """
    return size_model(read_model_shape(model), known, workload)


def choose(run: Run, *, deadline_s: float | None = None) -> Choice:
    """Choose the tier of a planned run for `hardware.tier`, its tokens, deadline and budget.

    Raises:
        EngineConfigError: nothing fits, or `hardware.tier` names no known GPU type.
        ModelError: config.json says too little.
    """
    job = run.job
    gpus, num_gpus = candidates(job)
    tier = choose_tier(
        read_model_shape(str(run.model.path)),
        gpus,
        planned_workload(run.store),
        options=sizing_options(run.settled_job, num_gpus),
        deadline_s=deadline_s,
        budget_usd=job.budget.usd,
    )
    return Choice(tier, next(gpu for gpu in gpus if gpu.name == tier.gpu))


def planned_workload(run: ObjectStore) -> Workload:
    """Return what a planned run asks of an engine, as `nightjar plan` reckons it.

    Raises:
        BadInput: it is not planned.
    """
    plan = load_plan(run)
    if plan is None:
        raise BadInput(f"{run.uri}: no plan.json; give a planned run's folder")
    return expected_workload(job_of(read_record(run)), plan)
