"""Tiers: a model's config and a run's token counts -> what fits where, how fast, at what price.

    shape = read_model_shape("models/qwen3-8b")
    sizing = size_model(shape, gpu_types(hardware), workload)     # every combination, the best marked
    tier = choose_tier(shape, gpu_types(hardware), workload, deadline_s=8 * 3600)

Both compare the same tiers in the same way, so the table and `tier: auto` cannot disagree. Nothing
here needs a GPU, a weight file or torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from inference.errors import EngineConfigError
from inference.hardware import GB, GpuType
from inference.model_shape import ModelShape
from inference.tier import QUANTIZATIONS, Options, Refusal, Tier
from inference.tier_choice import Objective, best_of
from inference.tier_fit import fits_on
from inference.workload import Workload

Detail = Literal["smallest", "powers", "all"]

# What a table is drawn for when no run is given: 10,000 chat turns of medium length.
DEFAULT_WORKLOAD = Workload.from_totals(10_000, 2_500_000, 2_500_000, max_completion_tokens=2048)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Every combination tried."""

    tiers: tuple[Tier, ...]
    refusals: tuple[Refusal, ...]
    best: Tier | None
    """One of `tiers`, with its reason; None when nothing fits."""


def size_model(
    shape: ModelShape,
    hardware: Sequence[GpuType],
    workload: Workload = DEFAULT_WORKLOAD,
    *,
    options: Options | None = None,
    deadline_s: float | None = None,
    budget_usd: float | None = None,
    objective: Objective = "cheapest",
) -> Sizing:
    """Size `shape` on every GPU type; see `choose_tier` for how the best is found."""
    options = options or Options()
    tiers: list[Tier] = []
    refusals: list[Refusal] = []
    for gpu in hardware:
        fitting, refused = fits_on(shape, gpu, workload, options)
        tiers.extend(fitting)
        refusals.extend(refused)
    best = best_of(tiers, deadline_s, budget_usd, objective) if tiers else None
    marked = tuple(best if best and tier == replace(best, reason="") else tier for tier in tiers)
    return Sizing(
        tiers=marked,
        refusals=tuple(replace(r, nearest=_nearest(r, tiers)) for r in refusals),
        best=best,
    )


def choose_tier(
    shape: ModelShape,
    hardware: Sequence[GpuType],
    workload: Workload,
    *,
    options: Options | None = None,
    deadline_s: float | None = None,
    budget_usd: float | None = None,
    objective: Objective = "cheapest",
) -> Tier:
    """The tier to run on, with one sentence that says why.

    Weights on the GPU come before offloaded ones, what can be predicted before what cannot, then what meets the
    deadline and the budget, then the least quantised, then `objective`: seconds, or dollars. Where no prices are
    given, hours of one GPU type are compared; several types cannot be, and the smallest GPUs are taken whose KV
    cache outweighs the weights. When nothing meets the deadline the fastest is taken and the reason says how late
    it is.

    Raises:
        EngineConfigError: nothing fits, or what meets the deadline is over the budget; with the arithmetic.
    """
    options = options or Options()
    sizing = size_model(
        shape,
        hardware,
        workload,
        options=options,
        deadline_s=deadline_s,
        budget_usd=budget_usd,
        objective=objective,
    )
    if sizing.best is None:
        raise EngineConfigError(_nothing_fits(sizing, shape, hardware, workload, options))
    if budget_usd is not None and (sizing.best.usd or 0.0) > budget_usd:
        raise EngineConfigError(_over_budget(sizing, sizing.best, budget_usd))
    return sizing.best


def tiers_table(sizing: Sizing, *, detail: Detail = "smallest") -> list[dict[str, Any]]:
    """Rows for a table or JSON: what fits, then what fits at no count, one row a GPU type and quantisation.

    The best tier is always there.

    `detail` says which counts of a GPU type and quantisation are shown: the smallest that fits,
    the powers of two, or all.
    """
    smallest: dict[tuple[str, str], int] = {}
    for tier in sizing.tiers:
        smallest.setdefault((tier.gpu, tier.quantization), tier.num_gpus)
    rows = [
        _row(tier, is_best=tier == sizing.best)
        for tier in sizing.tiers
        if detail == "all"
        or tier == sizing.best
        or (detail == "powers" and tier.num_gpus & (tier.num_gpus - 1) == 0)
        or (detail == "smallest" and tier.num_gpus == smallest[tier.gpu, tier.quantization])
    ]
    fitting = {(tier.gpu, tier.quantization) for tier in sizing.tiers}
    last = {(r.gpu, r.quantization): r for r in sizing.refusals}
    rows += [
        {
            "fits": False,
            "gpu": refusal.gpu,
            "num_gpus": refusal.num_gpus,
            "quantization": refusal.quantization,
            "reason": refusal.reason,
            "nearest": refusal.nearest,
        }
        for key, refusal in last.items()
        if key not in fitting
    ]
    return rows


def _row(tier: Tier, *, is_best: bool) -> dict[str, Any]:
    return {
        "fits": True,
        "best": is_best,
        "gpu": tier.gpu,
        "num_gpus": tier.num_gpus,
        "tensor_parallel_size": tier.tensor_parallel_size,
        "replicas": tier.replicas,
        "num_hosts": tier.num_hosts,
        "quantization": tier.quantization,
        "dtype": tier.dtype,
        "backend": tier.backend,
        "offload": tier.offload,
        "weights_gb_per_gpu": round(tier.weight_bytes_per_gpu / GB, 1),
        "kv_tokens": tier.kv_tokens,
        "num_running": tier.num_running,
        "completion_tokens_per_s": _rounded(tier.completion_tokens_per_s, 1),
        "total_tokens_per_s": _rounded(tier.total_tokens_per_s, 1),
        "hours": None if tier.seconds is None else round(tier.seconds / 3600, 3),
        "gpu_hours": _rounded(tier.gpu_hours, 3),
        "usd": _rounded(tier.usd, 2),
        "usd_per_million_tokens": _rounded(tier.usd_per_million_tokens, 3),
        "reason": tier.reason,
        "notes": list(tier.notes),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _nearest(refusal: Refusal, tiers: Sequence[Tier]) -> str:
    """The tier least different from what was asked.

    Weights on the GPU, the same GPU type, the same quantisation, then the fewest GPUs.
    """

    def distance(tier: Tier) -> tuple[bool, bool, bool, int, int]:
        return (
            tier.offload != "none",
            tier.gpu != refusal.gpu,
            tier.quantization != refusal.quantization,
            tier.num_gpus,
            QUANTIZATIONS.index(tier.quantization),
        )

    return min(tiers, key=distance).label if tiers else ""


def _over_budget(sizing: Sizing, best: Tier, budget_usd: float) -> str:
    cheapest = min((t for t in sizing.tiers if t.usd is not None), key=lambda t: t.usd or 0.0)
    fact = (
        f"budget.usd is {budget_usd:.2f} and {best.label} is predicted to cost {best.usd:.2f} "
        f"over {_hours(best)} h"
    )
    if cheapest.usd is not None and cheapest.usd <= budget_usd:
        return (
            f"{fact}; {cheapest.label} costs {cheapest.usd:.2f} but takes {_hours(cheapest)} h: "
            "raise the budget or move the deadline"
        )
    return f"{fact}; the cheapest is {cheapest.label} at {cheapest.usd:.2f}: raise the budget or send fewer rows"


def _hours(tier: Tier) -> str:
    return f"{(tier.seconds or 0.0) / 3600:.2f}"


def _nothing_fits(
    sizing: Sizing,
    shape: ModelShape,
    hardware: Sequence[GpuType],
    workload: Workload,
    options: Options,
) -> str:
    if not sizing.refusals:
        return "there is no GPU type to size the model for; add one to the hardware file"
    refusal = sizing.refusals[-1]
    widened = replace(
        options,
        quantizations=QUANTIZATIONS,
        tensor_parallel_size=None,
        replicas=None,
        backend="auto",
    )
    near = size_model(shape, hardware, workload, options=widened).tiers
    if not near:
        more = [replace(gpu, max_count=64) for gpu in hardware]
        near = size_model(shape, more, workload, options=widened).tiers
    remedy = _nearest(refusal, near)
    if not remedy:
        return f"{refusal}; no layout of these GPU types holds this model: use larger GPUs or a smaller model"
    return f"{refusal}; nearest that fits: {remedy}"
