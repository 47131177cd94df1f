"""ShardReader: an attempt begins by reading its shard's rows, and what a retry starts from."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.errors import CorruptObject
from storage.manifest import PlanManifest, Shard, file_digest
from storage.object_store import ObjectStore
from tasks.base_part import BasePart
from tasks.canary import Kept
from tasks.claims import Claim
from tasks.feed import PreparedBatch, PromptFeed
from tasks.results import ResultColumns
from tasks.reuse import ReuseIndex
from tasks.shard_answers import ShardAnswers
from tasks.shard_work import ShardWork
from tasks.stop import Stopped


@dataclass(slots=True, kw_only=True)
class ShardReader:
    """What all attempts of a replica have in common. One `read` at a time, in any thread."""

    plan: PlanManifest
    store: ObjectStore
    feed: PromptFeed
    columns: ResultColumns
    input_schema: Any
    """Arrow schema of the copied-through columns."""

    work_dir: Path
    kept: Kept = field(default_factory=dict)
    """Answers of the canary."""

    engine: bytes = b""
    """See `tasks.content.engine_digest`."""

    reuse: ReuseIndex | None = None
    """Answers of earlier runs."""

    _closing: threading.Event = field(default_factory=threading.Event)

    def begin(self, claim: Claim) -> ShardWork:
        """Return an attempt whose rows are not read yet."""
        return ShardWork(
            shard=claim.shard,
            attempt=claim.attempt,
            folder=self.work_dir / f"shard-{claim.shard.shard_id:05d}-{claim.attempt:03d}",
            columns=self.columns,
            input_schema=self.input_schema,
            num_samples=self.plan.num_samples,
            answers=ShardAnswers(
                engine=self.engine, num_samples=self.plan.num_samples, index=self.reuse
            ),
            kept=self.kept,
            started_at=time.monotonic(),
        )

    def read(self, work: ShardWork, claim: Claim) -> None:
        """Read the attempt's rows.

        Raises:
            CorruptObject: the part a retry starts from is not the one its commit names.
            StorageError, InferenceError, OSError: rows cannot be read.
            Stopped: `close` was called meanwhile.
        """
        started = time.monotonic()
        work.base = self._base(claim, work.folder)
        work.read(self._until_closed(work.shard))
        work.read_s = time.monotonic() - started

    def close(self) -> None:
        """End a `read` under way soon. Safe to repeat."""
        self._closing.set()

    def _until_closed(self, shard: Shard) -> Iterator[PreparedBatch]:
        for batch in self.feed.read(self.plan, shard.row_start, shard.row_end):
            if self._closing.is_set():
                raise Stopped
            yield batch

    def _base(self, claim: Claim, folder: Path) -> BasePart | None:
        if claim.base is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        path, part = folder / "base.parquet", claim.base.part
        self.store.download(part.key, path)
        found = file_digest(path)
        if found != part.sha256:
            raise CorruptObject(f"{part.key}: digest {found}, its commit says {part.sha256}")
        return BasePart(path, claim.shard.row_start)
