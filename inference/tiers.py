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
from inference.roofline import Workload
from inference.tier import QUANTIZATIONS, Options, Refusal, Tier
from inference.tier_fit import fits_on

Objective = Literal["cheapest", "fastest"]
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
    best = _best(tiers, deadline_s, budget_usd, objective) if tiers else None
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

    Weights on the GPU come before offloaded ones, then what meets the deadline and the budget, then
    the least quantised, then `objective`: dollars (GPU-hours where a price is missing), or seconds.
    When nothing meets the deadline the fastest is taken and the reason says how late it is.

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
        "completion_tokens_per_s": round(tier.completion_tokens_per_s, 1),
        "total_tokens_per_s": round(tier.total_tokens_per_s, 1),
        "hours": round(tier.seconds / 3600, 3),
        "gpu_hours": round(tier.gpu_hours, 3),
        "usd": None if tier.usd is None else round(tier.usd, 2),
        "usd_per_million_tokens": (
            None if tier.usd_per_million_tokens is None else round(tier.usd_per_million_tokens, 3)
        ),
        "reason": tier.reason,
        "notes": list(tier.notes),
    }


def _best(
    tiers: Sequence[Tier], deadline_s: float | None, budget_usd: float | None, objective: Objective
) -> Tier:
    # Once any price is known, a tier without one cannot be compared: it is listed, not chosen.
    priced = [tier for tier in tiers if tier.usd is not None]
    pool = priced or list(tiers)
    resident = [tier for tier in pool if tier.offload == "none"] or pool
    in_time = [t for t in resident if deadline_s is None or t.seconds <= deadline_s]
    late = not in_time
    if late:
        objective = "fastest"
    allowed = in_time or resident
    within = [t for t in allowed if budget_usd is None or t.usd is None or t.usd <= budget_usd]
    allowed = within or allowed
    least = min(QUANTIZATIONS.index(tier.quantization) for tier in allowed)
    allowed = [t for t in allowed if QUANTIZATIONS.index(t.quantization) == least]

    def rank(tier: Tier) -> tuple[float, float, int]:
        cost = tier.gpu_hours if tier.usd is None else tier.usd
        if objective == "fastest":
            return tier.seconds, cost, tier.num_gpus
        return cost, tier.seconds, tier.num_gpus

    best = min(allowed, key=rank)
    return replace(best, reason=_reason(best, len(tiers), deadline_s, late, objective))


def _reason(
    tier: Tier, num_fitting: int, deadline_s: float | None, late: bool, objective: Objective
) -> str:
    hours = tier.seconds / 3600
    if late and deadline_s is not None:
        why = f"nothing meets the deadline, and this is the fastest, {(tier.seconds - deadline_s) / 3600:.2f} h late"
    elif objective == "fastest":
        why = "the fastest"
    elif tier.usd is not None:
        why = f"the cheapest (${tier.usd:.2f})"
    else:
        why = f"the fewest GPU-hours ({tier.gpu_hours:.2f}; no prices are given)"
    if not late and deadline_s is not None:
        why += f" that meets the deadline of {deadline_s / 3600:.2f} h"
    weights = f"{tier.weight_bytes_per_gpu / GB:.1f} GB of weights a GPU leave room for {tier.kv_tokens:,} KV tokens"
    if tier.offload != "none":
        weights = f"the weights stay on {tier.offload}"
    options = f"of {num_fitting} that fit" if num_fitting > 1 else "that fits"
    return f"{tier.label}: {weights}; {hours:.2f} h predicted, {why}, {options}"


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
        f"over {best.seconds / 3600:.2f} h"
    )
    if cheapest.usd is not None and cheapest.usd <= budget_usd:
        return (
            f"{fact}; {cheapest.label} costs {cheapest.usd:.2f} but takes {cheapest.seconds / 3600:.2f} h: "
            "raise the budget or move the deadline"
        )
    return f"{fact}; the cheapest is {cheapest.label} at {cheapest.usd:.2f}: raise the budget or send fewer rows"


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
