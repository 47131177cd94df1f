"""preflight: everything that can be known of a job before it runs, without a GPU and without a run.

Nothing is written into the output: the plan goes to a scratch folder. The terminal, `--json` and
the letter of the inbox show this one document.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inference.workload import Workload
from storage.inputs import InputFiles
from storage.manifest import PlanManifest, RunRecord
from storage.object_store import open_store
from tasks.choose_tier import Choice, choose_hardware, settle_backend
from tasks.deadline import deadline_at
from tasks.feed import PromptFeed
from tasks.feed_process import FeedProcess
from tasks.fingerprint import fingerprint_fields
from tasks.forecast import Forecast, lengths_of
from tasks.history import read_history
from tasks.job import RunConfig
from tasks.model import RunModel, peek_model
from tasks.plan import make_plan
from tasks.progress import Progress
from tasks.run_forecast import expected_workload, forecast_run, num_to_generate

NUM_SAMPLES = 3
_LOOK_FOR_PROMPT = 64  # rows searched for the first that can run


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What a job would do. Plain values throughout: `as_document` is strict JSON."""

    name: str
    model: str
    input_uri: str | list[str]
    files: list[dict[str, Any]]
    schema: list[dict[str, str]]
    """Name and type of each input column that is copied through."""

    samples: list[dict[str, str]]
    """The first rows, values as clipped text; empty when the job's text is not to be shown."""

    num_rows: int
    num_sequences: int
    """Completions that will be generated."""

    num_reused: int
    """Completions that will be copied from the runs that `reuse_from` names."""

    bad_rows_by_state: dict[str, int]
    bad_row_examples: list[dict[str, Any]]
    """Row number, state and reason of the first bad rows."""

    num_repeated_ids: int
    """Rows whose id an earlier row had."""

    num_repeated_prompts: int
    """Rows that give the model the very prompt of an earlier row."""

    num_truncated_prompts: int
    num_prompt_tokens: int
    prompt_tokens_histogram: dict[str, int]
    """Rows by prompt tokens: the bound of each bucket, a power of two, and its count."""

    shared_prefix_share: float
    """Of all prompt tokens, those a prefix cache need not compute."""

    max_model_len: int
    num_shards: int
    first_prompt: str | None
    """Of the first row that can run: exactly what the model is given, special tokens spelt out."""

    first_prompt_row: int | None
    warnings: list[str]
    hardware: dict[str, Any]
    """Backend, device, replicas, tier and why; see `tasks.choose_tier.Choice`."""

    forecast: Forecast
    planning: dict[str, float | None]
    """Seconds, and prompt tokens per second, that planning took here."""

    @property
    def num_bad_rows(self) -> int:
        """Rows that cannot run."""
        return sum(self.bad_rows_by_state.values())

    def as_document(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "num_bad_rows": self.num_bad_rows}


def preflight(
    job: RunConfig,
    *,
    work_dir: Path,
    progress: Progress | None = None,
    show_text: bool = True,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Preflight:
    """Read, render and count the whole input, and forecast the run.

    Args:
        job: The job.
        work_dir: A scratch folder of the caller's.
        progress: Counters to keep.
        show_text: Whether rows and the first prompt may be in the document.
        now: The clock.

    Raises:
        StorageError, InferenceError: what would stop the run before its first shard.
    """
    progress = progress or Progress()
    starts_at = now()
    deadline = job.deadline and deadline_at(job.deadline, start=starts_at, timezone=job.timezone)
    with _peeked(job, work_dir, progress) as model:
        started = time.monotonic()
        plan, shown = _planned(job, model, work_dir, progress)
        plan_s = time.monotonic() - started
        progress.phase = "forecasting"
        history = read_history(job)
        lengths = lengths_of(history, job.sampling.max_tokens)
        seconds_left = (deadline - starts_at).total_seconds() if deadline else None
        choice = choose_hardware(
            job,
            str(model.path),
            expected_workload(job, plan),
            deadline_s=seconds_left,
        )
        expected = forecast_run(
            job, plan, choice, history, lengths, starts_at=starts_at, plan_s=plan_s
        )
        return _document(job, plan, shown, choice, expected, plan_s, model.max_model_len, show_text)


def job_workload(job: RunConfig, *, work_dir: Path, progress: Progress) -> Workload:
    """Read, render and count the whole input; return what it asks of an engine.

    Raises:
        StorageError, InferenceError: what would stop the run before its first shard.
    """
    with _peeked(job, work_dir, progress) as model:
        plan, _ = _planned(job, model, work_dir, progress)
        return expected_workload(job, plan)


@contextmanager
def _peeked(job: RunConfig, work_dir: Path, progress: Progress) -> Iterator[RunModel]:
    """What planning needs of the model, while it plans."""
    model = peek_model(job, work_dir=work_dir, progress=progress)
    try:
        progress.phase = "planning"
        yield model
    finally:
        model.close()


def _planned(
    job: RunConfig, model: RunModel, work_dir: Path, progress: Progress
) -> tuple[PlanManifest, dict[str, Any]]:
    """Return the plan, made in a scratch folder, and a few rows of it for the eye."""
    common: dict[str, Any] = {
        "job": job,
        "model_dir": model.path,
        "store": open_store(str(work_dir / "plan")),
        "work_dir": work_dir,
        "max_model_len": model.max_model_len,
        "files": InputFiles(work_dir, job.storage),
    }
    child = FeedProcess.of(job, model_dir=model.path, max_model_len=model.max_model_len)
    with child as process:
        plan = make_plan(
            **common, record=_record(job, model), on_progress=progress.planned, process=process
        )
        with PromptFeed(**common, process=process) as feed:
            return plan, feed.show(plan, num_samples=NUM_SAMPLES, num_rows=_LOOK_FOR_PROMPT)


def _record(job: RunConfig, model: RunModel) -> RunRecord:
    assert model.content_id is not None, "a look tells which model it is"
    fields = fingerprint_fields(
        job,
        model_content_id=model.content_id,
        backend=settle_backend(job, model.path).engine.backend,
        max_model_len=model.max_model_len,
    )
    return RunRecord(
        run_id="preflight",
        name=job.name,
        fingerprint="preflight",
        fingerprint_fields=fields,
        job={},
        versions={},
        created_at="",
    )


def _document(
    job: RunConfig,
    plan: PlanManifest,
    shown: dict[str, Any],
    choice: Choice,
    expected: Forecast,
    plan_s: float,
    max_model_len: int,
    show_text: bool,
) -> Preflight:
    rate = plan.num_prompt_tokens / plan_s if plan_s > 0 else None
    return Preflight(
        name=job.name,
        model=job.model.source,
        input_uri=job.input.uri,
        files=[
            {
                "uri": f.uri,
                "format": f.format,
                "num_rows": f.num_rows,
                "size": f.size,
                "error": f.error,
            }
            for f in plan.inputs
        ],
        schema=shown["schema"],
        samples=shown["samples"] if show_text else [],
        num_rows=plan.num_rows,
        num_sequences=num_to_generate(plan),
        num_reused=plan.stats["num_reused_sequences"],
        bad_rows_by_state=plan.bad_rows_by_state,
        bad_row_examples=plan.bad_row_examples,
        num_repeated_ids=int(plan.stats.get("num_repeated_ids") or 0),
        num_repeated_prompts=int(plan.stats["num_repeated_prompts"]),
        num_truncated_prompts=int(plan.stats["num_truncated_prompts"]),
        num_prompt_tokens=plan.num_prompt_tokens,
        prompt_tokens_histogram=plan.stats["prompt_tokens_histogram"],
        shared_prefix_share=plan.stats["shared_prefix_share"],
        max_model_len=max_model_len,
        num_shards=plan.num_shards,
        first_prompt=shown["prompt"] if show_text else None,
        first_prompt_row=shown["row"],
        warnings=list(plan.stats.get("warnings") or []),
        hardware=choice.as_document(),
        forecast=expected,
        planning={
            "seconds": round(plan_s, 3),
            "prompt_tokens_per_s": None if rate is None else round(rate, 1),
        },
    )
