"""A planned run's forecast: its tokens, on the hardware chosen for it, at the speed of earlier runs."""

from datetime import UTC, datetime
from pathlib import Path

from inference.hardware import is_called
from inference.workload import Workload
from storage.manifest import PlanManifest
from tasks.budget import check_budget
from tasks.canary import wants_canary
from tasks.choose_tier import Choice, choose_hardware
from tasks.deadline import deadline_at
from tasks.forecast import Forecast, Lengths, Work, forecast, lengths_of, speed_of
from tasks.history import History, read_history
from tasks.job import RunConfig


def num_to_generate(plan: PlanManifest) -> int:
    """Return how many completions a planned run needs of its engine."""
    every = (plan.num_rows - plan.num_bad_rows) * plan.num_samples
    return every - int(plan.stats.get("num_reused_sequences", 0))


def num_tokens_to_prefill(plan: PlanManifest) -> int:
    """Return the prompt tokens of those completions."""
    every = plan.num_prompt_tokens * plan.num_samples
    return every - int(plan.stats.get("num_reused_prompt_tokens", 0))


def workload_of(plan: PlanManifest, lengths: Lengths, max_tokens: int) -> Workload:
    """Return a plan's token counts as the sizing takes them."""
    num_sequences = max(1, num_to_generate(plan))
    share = plan.stats.get("shared_prefix_share") or 0.0
    num_prompt_tokens = num_tokens_to_prefill(plan)
    return Workload.from_totals(
        num_sequences,
        num_prompt_tokens,
        round(num_sequences * lengths.mean),
        max_completion_tokens=max_tokens,
        num_reused_prompt_tokens=num_prompt_tokens * share,
    )


def expected_workload(job: RunConfig, plan: PlanManifest) -> Workload:
    """Return a plan's token counts with the completion lengths of earlier runs, or half of max_tokens."""
    max_tokens = job.sampling.max_tokens
    return workload_of(plan, lengths_of(read_history(job), max_tokens), max_tokens)


def refuse_over_budget(job: RunConfig, plan: PlanManifest, model_dir: Path) -> None:
    """Refuse a planned run that is forecast to cost more than `budget.usd`.

    For a run without a commit: later the gate before each shard decides.

    Raises:
        BadInput: with the forecast and what it rests on.
        EngineConfigError: no hardware fits.
    """
    history = read_history(job)
    lengths = lengths_of(history, job.sampling.max_tokens)
    workload = workload_of(plan, lengths, job.sampling.max_tokens)
    choice = choose_hardware(job, str(model_dir), workload)
    now = datetime.now(UTC)
    check_budget(job, forecast_run(job, plan, choice, history, lengths, starts_at=now, plan_s=0.0))


def forecast_run(
    job: RunConfig,
    plan: PlanManifest,
    choice: Choice,
    history: History,
    lengths: Lengths,
    *,
    starts_at: datetime,
    plan_s: float,
) -> Forecast:
    """Forecast a planned run on the hardware chosen for it."""
    past = history.last
    same = past is not None and past.backend == choice.backend and _is_device(past.device, choice)
    speed = None
    if past is not None and same:
        speed = speed_of(past, history, has_canary=wants_canary(job.canary, plan))
    num_sequences = num_to_generate(plan)
    num_prompt_tokens = float(num_tokens_to_prefill(plan))
    # An earlier run says what its cache saved in fact; a plan only what could be saved.
    saved = plan.stats.get("shared_prefix_share") or 0.0
    if speed is None or past is None:
        num_prompt_tokens *= 1 - saved
    tier_seconds = None
    if choice.tier is not None and choice.tier.seconds is not None:
        seconds = choice.tier.seconds
        tier_seconds = (seconds, seconds * lengths.high / lengths.mean if lengths.mean else seconds)
    deadline = job.deadline and deadline_at(job.deadline, start=starts_at, timezone=job.timezone)
    return forecast(
        work=Work(num_sequences=num_sequences, num_prefill_tokens=num_prompt_tokens),
        lengths=lengths,
        speed=speed,
        tier_seconds=tier_seconds,
        starts_at=starts_at,
        plan_s=plan_s,
        replicas=choice.replicas,
        gpus_per_replica=choice.gpus_per_replica,
        price_per_hour=choice.price_per_hour,
        deadline=deadline or None,
        budget_usd=job.budget.usd,
    )


def _is_device(device: str, choice: Choice) -> bool:
    """Whether an earlier run's device is the one chosen; `none` and `cpu` are both no GPU."""
    if choice.device == "cpu":
        return device in ("cpu", "none")
    return device == choice.device or is_called(choice.device, device)
