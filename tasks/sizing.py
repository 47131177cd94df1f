"""A model and a run's token counts to a sizing: what fits where, how fast, at what price."""

from inference.model_config import read_model_shape
from inference.roofline import Workload
from inference.tiers import DEFAULT_WORKLOAD, Sizing, size_model
from storage.errors import BadInput
from storage.object_store import ObjectStore
from tasks.hardware import load_hardware
from tasks.plan import load_plan


def size(model: str, *, hardware: str | None = None, run: ObjectStore | None = None) -> Sizing:
    """Size a model folder on every GPU type of a hardware file, for a planned run's tokens if given.

    Raises:
        ModelError: config.json is missing or says too little.
        EngineConfigError: the hardware file is wrong.
        BadInput: `run` is not a planned run.
    """
    workload = DEFAULT_WORKLOAD if run is None else _workload(run)
    return size_model(read_model_shape(model), load_hardware(hardware), workload)


def _workload(run: ObjectStore) -> Workload:
    from tasks.run import read_record

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
