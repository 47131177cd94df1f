"""What the input tests share: a job over a test model, planned and read back in one call."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from storage.manifest import PlanManifest, RunRecord, Shard
from storage.memory_store import MemoryStore
from storage.object_store import ObjectStore
from tasks.feed import PreparedBatch, PreparedRow, PromptFeed
from tasks.feed_process import FeedProcess
from tasks.job import InputConfig, ModelConfig, OutputConfig, RunConfig, SamplingConfig, ShardConfig
from tasks.plan import make_plan
from tasks.run_record import load_shards

DATA = Path(__file__).parent / "data"
CASES = DATA / "cases"
MODELS = DATA / "models"
RECORD = RunRecord(
    run_id="run",
    name="run",
    fingerprint="f",
    fingerprint_fields={},
    job={},
    versions={},
    created_at="",
)


class Fed(NamedTuple):
    """A plan and everything its feed gives."""

    plan: PlanManifest
    shards: list[Shard]
    batches: list[PreparedBatch]
    warnings: list[str]

    @property
    def rows(self) -> list[PreparedRow]:
        return [row for batch in self.batches for row in batch.rows]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for batch in self.batches for record in batch.columns.to_pylist()]

    def tokens(self, column: str = "id") -> dict[Any, int | None]:
        """Prompt tokens by id."""
        pairs = zip(self.records, self.rows, strict=True)
        return {record[column]: row.num_prompt_tokens for record, row in pairs}


def make_job(uri: Any, **settings: Any) -> RunConfig:
    """Make a job; settings of the input go in by name, other sections as dictionaries."""
    sections = {
        "sampling": SamplingConfig(**{"max_tokens": 8, **settings.pop("sampling", {})}),
        "shards": ShardConfig(**settings.pop("shards", {})),
        "output": OutputConfig(uri="memory://out", **settings.pop("output", {})),
        "sampling_columns": settings.pop("sampling_columns", "auto"),
    }
    uri = [str(item) for item in uri] if isinstance(uri, list) else str(uri)
    return RunConfig(
        model=ModelConfig(source="test"), input=InputConfig(uri=uri, **settings), **sections
    )


class Bench:
    """Plans and feeds in a folder of its own."""

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = work_dir
        self.store: ObjectStore = MemoryStore()

    def plan(
        self, job: RunConfig, model: str | Path, *, max_model_len: int = 256, **extra: Any
    ) -> PlanManifest:
        return make_plan(
            job=job,
            record=dataclasses.replace(RECORD),
            store=self.store,
            model_dir=MODELS / model,
            work_dir=self.work_dir,
            max_model_len=max_model_len,
            **extra,
        )

    def open(
        self, job: RunConfig, model: str | Path, *, max_model_len: int = 256, **extra: Any
    ) -> PromptFeed:
        return PromptFeed(
            job=job,
            model_dir=MODELS / model,
            store=self.store,
            work_dir=self.work_dir,
            max_model_len=max_model_len,
            **extra,
        )

    def run(self, uri: Any, model: str | Path, **settings: Any) -> Fed:
        """Plan, then read every row."""
        max_model_len = settings.pop("max_model_len", 256)
        limits = settings.pop("limits", None)
        job = make_job(uri, **settings)
        with FeedProcess.of(
            job, model_dir=MODELS / model, max_model_len=max_model_len, limits=limits
        ) as process:
            plan = self.plan(job, model, max_model_len=max_model_len, process=process)
            feed = self.open(job, model, max_model_len=max_model_len, process=process)
            batches = list(feed.read(plan, 0, plan.num_rows))
            warnings = feed.warnings
        return Fed(plan, load_shards(self.store, plan), batches, warnings)
