"""The canary's place in a run: after the plan, before replicas; its engine goes on as the first one."""

from datetime import UTC, datetime

from tasks.budget import check_budget
from tasks.canary import read_canary, refuse_bad_canary, run_canary, wants_canary
from tasks.choose_tier import choose_hardware
from tasks.drain import build_engine
from tasks.forecast import lengths_of_canary
from tasks.history import read_history
from tasks.preflight import forecast_run, workload_of
from tasks.progress import Progress
from tasks.run import Run


def try_canary(run: Run, *, progress: Progress) -> None:
    """Run the sample if the job wants one and nothing is committed yet; note what it showed.

    Raises:
        CanaryFailed: it broke a limit; its answers are kept as evidence.
        BadInput: with its lengths the forecast is over the budget.
        InferenceError, StorageError: no engine, or no rows.
    """
    job, config = run.job, run.job.canary
    if not wants_canary(config, run.plan) or run.commits():
        return
    progress.phase = f"canary of {config.rows} rows"
    history = read_history(job)
    result = read_canary(run.store)
    if result is None:
        run.warm_backend = backend = build_engine(run)
        with run.open_feed() as feed:
            result = run_canary(
                run.store, run.plan, feed, backend, num_rows=config.rows, columns=run.columns
            )
    refuse_bad_canary(run.store, result, config, history.last)
    lengths = lengths_of_canary(
        result.num_sequences, result.num_completion_tokens, job.sampling.max_tokens
    )
    workload = workload_of(run.plan, lengths, job.sampling.max_tokens)
    choice = choose_hardware(job, str(run.model.path), workload)
    expected = forecast_run(
        job, run.plan, choice, history, lengths, starts_at=datetime.now(UTC), plan_s=0.0
    )
    progress.note(f"canary: {result.num_rows} rows are well; {expected.sentence}")
    check_budget(job, expected)
