"""A planned run in hand: its job, record, plan and shards, and what this process keeps warm for it.

Made by `tasks.run`; closed by whoever asked for it.
"""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

from inference.backends import Backend
from inference.config import Backend as BackendName
from storage.commits import CommitCache, current_commits
from storage.errors import BadInput
from storage.manifest import CommitRecord, PlanManifest, RunRecord, Shard
from storage.object_store import ObjectStore
from tasks.feed import PromptFeed
from tasks.feed_process import FeedProcess
from tasks.job import RunConfig
from tasks.metering import Meter
from tasks.model import RunModel
from tasks.results import ResultColumns
from tasks.reuse import ReuseIndex, open_reuse

log = logging.getLogger("nightjar.run")


@dataclasses.dataclass(slots=True, kw_only=True)
class Run:
    """A planned run and how to reach everything of it."""

    job: RunConfig
    record: RunRecord
    store: ObjectStore
    plan: PlanManifest
    plan_digest: str
    shards: list[Shard]
    model: RunModel
    work_dir: Path
    max_model_len: int
    feed_process: FeedProcess | None = None
    """What planned, its tokenizer loaded, for the first feed to take over."""

    commit_cache: CommitCache = dataclasses.field(default_factory=dict)
    reuse_index: ReuseIndex | None = None
    warm_backend: Backend | None = None
    """The engine of the canary, for the first replica in this process to take over."""

    spent: Meter = dataclasses.field(default_factory=Meter)
    """Seconds that engine has taken so far."""

    @property
    def uri(self) -> str:
        """The run folder."""
        return self.store.uri

    @property
    def backend(self) -> BackendName:
        """Which one the run was planned for, and every replica of it has."""
        return cast("BackendName", self.record.fingerprint_fields["engine.backend"])

    @property
    def settled_job(self) -> RunConfig:
        """The job with that backend in place of `auto`."""
        engine = dataclasses.replace(self.job.engine, backend=self.backend)
        return dataclasses.replace(self.job, engine=engine)

    @property
    def columns(self) -> ResultColumns:
        """Result columns of this run's parts."""
        return ResultColumns(
            token_ids=self.job.output.token_ids, logprobs=self.job.sampling.logprobs is not None
        )

    def take_backend(self) -> Backend | None:
        """Hand the canary's engine over; None if there is none."""
        backend, self.warm_backend = self.warm_backend, None
        return backend

    def take_spent(self) -> Meter:
        """Hand over what the canary's engine has taken, to be counted once."""
        spent, self.spent = self.spent, Meter()
        return spent

    @contextmanager
    def open_feed(self, *, goes_on: bool = False) -> Iterator[PromptFeed]:
        """Yield a feed of this run's rows; with `goes_on` the next feed takes its process over, warm."""
        process, self.feed_process = self.feed_process, None
        process = process or FeedProcess.of(
            self.job, model_dir=self.model.path, max_model_len=self.max_model_len
        )
        with ExitStack() as ended:
            ended.enter_context(process)
            yield PromptFeed(
                job=self.job,
                model_dir=self.model.path,
                store=self.store,
                work_dir=self.work_dir,
                max_model_len=self.max_model_len,
                process=process,
            )
            if goes_on:
                self.feed_process = process
                ended.pop_all()

    def open_reuse(self) -> ReuseIndex | None:
        """Return the answers of earlier runs that the plan counts on; None without any.

        One that has vanished meanwhile costs only that its rows are generated. Raises StorageError.
        """
        uris = self.plan.stats.get("reuse_from")
        if uris and self.reuse_index is None:
            try:
                self.reuse_index = open_reuse(
                    uris,
                    self.record.fingerprint_fields,
                    storage=self.job.storage,
                    folder=self.work_dir / "reuse",
                )
            except BadInput as error:
                log.warning("%s; all rows are generated", error)
        return self.reuse_index

    def close(self) -> None:
        """Let go of the model, the feed and an engine nobody took. Safe to repeat."""
        if self.reuse_index is not None:
            self.reuse_index.close()
        unused = self.take_backend()
        if unused is not None:
            unused.close()
        if self.feed_process is not None:
            self.feed_process.close()
        self.model.close()

    def commits(self) -> dict[int, CommitRecord]:
        """Return what is committed now, by shard."""
        return current_commits(self.store, self.plan_digest, cache=self.commit_cache)
