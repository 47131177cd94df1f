"""The canary's place in a run: after the plan, before replicas; its engine goes on as the first one."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from inference.backends import Backend
from inference.errors import EngineFault
from tasks.budget import check_budget
from tasks.canary import (
    CanaryResult,
    last_canary_rate,
    read_canary,
    refuse_bad_canary,
    run_canary,
    wants_canary,
)
from tasks.choose_tier import choose_hardware
from tasks.content import prompt_digest, row_digest
from tasks.feed import PreparedRow
from tasks.forecast import lengths_of_canary
from tasks.history import read_history
from tasks.metering import Meter
from tasks.progress import Progress
from tasks.run import Run
from tasks.run_engine import build_engine
from tasks.run_forecast import forecast_run, workload_of
from tasks.unforeseen import engine_faults


def try_canary(run: Run, *, progress: Progress) -> None:
    """Run the sample if the job wants one and nothing is committed yet; note what it showed.

    Raises:
        CanaryFailed: it broke a limit; its answers are kept as evidence.
        BadInput: with its lengths the forecast is over the budget.
        EngineFault: the engine broke; nothing is kept, and another start runs the sample again.
        InferenceError, StorageError: no engine, or no rows.
    """
    config = run.job.canary
    if not wants_canary(config, run.plan) or run.commits():
        return
    progress.phase = f"canary of {config.rows} rows"
    result = read_canary(run.store)
    if result is None:
        try:
            result = _run_sample(run)
        except EngineFault as error:
            raise EngineFault(
                f"canary of {config.rows} rows: {error}; run the same again, or go on with --set canary.rows=0"
            ) from error
    judge(run, result, progress=progress)


def _run_sample(run: Run) -> CanaryResult:
    """Run the sample on an engine that is left for the replica. Raises as `try_canary`."""
    backend = _warm_engine(run)
    with run.open_feed(goes_on=True) as feed:
        started = time.monotonic()
        result = run_canary(
            run.store,
            run.plan,
            feed,
            backend,
            num_rows=run.job.canary.rows,
            columns=run.columns,
            is_known=_is_known(run),
        )
        run.spent.canary_s = time.monotonic() - started
    return result


def _warm_engine(run: Run) -> Backend:
    """Build the run's engine, note what it took, and leave it for the replica that follows."""
    started = time.monotonic()
    with engine_faults():
        backend: Backend = build_engine(run)
    run.warm_backend = backend
    elapsed = time.monotonic() - started
    waited_s = run.model.take_waited_s()
    run.spent = Meter(
        stage_s=waited_s,
        warmup_s=backend.info.warmup_s,
        load_s=elapsed - waited_s - backend.info.warmup_s,
    )
    return backend


def judge(run: Run, result: CanaryResult, *, progress: Progress) -> None:
    """Hold a sample against the job's limits, the last good run and the budget; note the forecast.

    Raises:
        CanaryFailed, BadInput: as `try_canary`.
    """
    job = run.job
    history = read_history(job)
    # Truncated and failed rows are never reused: what is left is no longer like the last run's rows.
    last = None if run.plan.stats.get("num_reused_sequences") else history.last
    refuse_bad_canary(run.store, result, job.canary, last)
    lengths = lengths_of_canary(
        result.num_sequences, result.num_completion_tokens, job.sampling.max_tokens
    )
    workload = workload_of(run.plan, lengths, job.sampling.max_tokens)
    choice = choose_hardware(job, str(run.model.path), workload)
    expected = forecast_run(
        job, run.plan, choice, history, lengths, starts_at=datetime.now(UTC), plan_s=0.0
    )
    before = last_canary_rate(result, last)
    known = "" if before is None else f" ({before:,.1f} in the last good run's)"
    progress.note(
        f"canary: {result.num_rows} rows are well, {result.completion_tokens_per_s:,.1f} tokens/s"
        f"{known}; {expected.sentence}"
    )
    check_budget(job, expected)


class CanaryVerdict:
    """Whether more than one replica may be started: asked again and again, from the store."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run = run
        self._progress = progress
        self._is_good = not wants_canary(run.job.canary, run.plan)

    def is_good(self) -> bool:
        """Return False while the sample is being run. Raises CanaryFailed, BadInput, as `try_canary`."""
        if not self._is_good:
            result = read_canary(self._run.store)
            if self._run.commits():
                self._is_good = True  # whoever committed has judged it
            elif result is not None:
                judge(self._run, result, progress=self._progress)
                self._is_good = True
        return self._is_good


def _is_known(run: Run) -> Callable[[PreparedRow], bool]:
    index, num_samples = run.open_reuse(), run.plan.num_samples
    if index is None:
        return lambda row: False

    def is_known(row: PreparedRow) -> bool:
        prompt = prompt_digest(row.token_ids, is_thinking=row.is_thinking)
        content = row_digest(prompt, row.sampling, row.row_key)
        return index.num_known([content], num_samples) == [num_samples]

    return is_known
