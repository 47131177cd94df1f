"""A finished attempt becomes real: write the part, upload it, commit, reveal.

part on local disk -> _attempts/00042/003/completions.parquet -> commits/00042.json -> completions/
"""

import logging
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

from inference.backends.base import Backend, BackendInfo, EngineStats
from storage import keys
from storage.answers import ANSWERS
from storage.attempts import PART
from storage.commits import CommitOutcome, commit_attempt, new_nonce
from storage.errors import NoSpace, StorageError
from storage.failpoints import failpoint
from storage.garbage import withdraw
from storage.manifest import CommitRecord, Json, PartFile
from storage.object_store import ObjectStore
from storage.reveal import reveal
from storage.shard_writer import WrittenPart
from tasks.claims import Claim
from tasks.metering import Mark
from tasks.receipt import ShardFacts, shard_receipt
from tasks.shard_work import ShardWork, Written
from tasks.yardstick import Yardstick

log = logging.getLogger("nightjar.commit")

_RETRY_FOR_S = 600.0  # a finished shard is worth waiting ten minutes for its store
T = TypeVar("T")


class CommitResult(NamedTuple):
    """How the commit ended: `committed`, `lost` or `unchanged`."""

    outcome: str
    record: CommitRecord | None


@dataclass(slots=True, kw_only=True)
class ShardCommitter:
    """Runs in the replica's commit thread."""

    store: ObjectStore
    plan_digest: str
    holder: str
    stage_s: float = 0.0
    stopping: threading.Event
    measure: Callable[[BackendInfo], Yardstick] = lambda info: Yardstick()
    """What a receipt is measured by, once the engine is there."""

    device: Callable[[], dict[str, float] | None] = lambda: None
    """What the driver said of the GPU since the last call."""

    def commit(
        self,
        work: ShardWork,
        claim: Claim,
        backend: Backend | None,
        before: Mark,
        after: Mark,
    ) -> CommitResult:
        """Write, upload and commit one attempt. Raises StorageError when the store stays away."""
        written = work.write()
        part, states, tokens = written.part, written.states, written.tokens
        if work.base is not None and not work.base.num_improved:
            return CommitResult("unchanged", None)
        info = backend.info if backend else _NO_ENGINE
        receipt = shard_receipt(
            info=info,
            stats=backend.stats if backend else EngineStats(),
            before=before,
            after=after,
            facts=_facts(work, written, self.device()),
            yardstick=self.measure(info),
        )
        receipt["answers"] = written.answers.sha256
        key = keys.attempt(work.shard.shard_id, work.attempt, PART)
        record = self._record(work, claim, part, key, dict(states), receipt)
        outcome = self._store_and_commit(written, record)
        if outcome.record.tombstone is not None:
            return CommitResult("lost", None)
        self._patiently(lambda: reveal(self.store, outcome.record, is_new=outcome.won))
        log.info(
            "shard=%05d attempt=%d %s rows=%d num_completion_tokens=%d",
            record.shard_id,
            record.attempt,
            "committed" if outcome.won else "lost to another attempt",
            part.num_rows,
            tokens["completion"],
        )
        return CommitResult("committed" if outcome.won else "lost", outcome.record)

    def _store_and_commit(self, written: Written, record: CommitRecord) -> CommitOutcome:
        num_tries = 0

        def commit() -> CommitOutcome:
            nonlocal num_tries
            num_tries += 1
            return commit_attempt(self.store, record)

        beside = keys.attempt(record.shard_id, record.attempt, ANSWERS)
        try:
            self._patiently(lambda: self.store.upload(written.part.path, record.part.key))
            self._patiently(lambda: self.store.upload(written.answers.path, beside))
            failpoint("after_data")
            return self._patiently(commit)
        except NoSpace:
            # A commit tried before, whose answer never came, might still arrive; the one try that the
            # full disk refused cannot.
            if num_tries <= 1:
                self._withdraw(record)
            raise

    def _withdraw(self, record: CommitRecord) -> None:
        """Leave nothing behind on a full disk: only we could still have committed it."""
        try:
            withdraw(self.store, record)
        except StorageError as error:
            log.warning(
                "shard=%05d attempt=%d files are left: %s", record.shard_id, record.attempt, error
            )

    def _record(
        self,
        work: ShardWork,
        claim: Claim,
        part: WrittenPart,
        key: str,
        counts: dict[str, int],
        receipt: Json,
    ) -> CommitRecord:
        return CommitRecord(
            shard_id=work.shard.shard_id,
            revision=claim.revision,
            nonce=new_nonce(),
            attempt=work.attempt,
            plan_digest=self.plan_digest,
            row_start=work.shard.row_start,
            row_end=work.shard.row_end,
            part=PartFile(key=key, size=part.size, sha256=part.sha256, num_rows=part.num_rows),
            counts=counts,
            receipt=receipt,
            holder=self.holder,
            committed_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )

    def _patiently(self, effect: Callable[[], T]) -> T:
        """Repeat through a store outage: what was generated is dearer than the wait."""
        deadline = time.monotonic() + _RETRY_FOR_S
        pause_s = 1.0
        while True:
            try:
                return effect()
            except StorageError as error:
                if not error.retryable or time.monotonic() > deadline:
                    raise
                log.warning("store unavailable, trying again in %.0f s: %s", pause_s, error)
            if self.stopping.wait(pause_s):
                return effect()
            pause_s = min(30.0, pause_s * 2)


def _facts(work: ShardWork, written: Written, device: dict[str, float] | None) -> ShardFacts:
    return ShardFacts(
        states=written.states,
        tokens=written.tokens,
        lengths=written.lengths,
        reused=work.answers.reused,
        num_repetitive=work.num_repetitive,
        read_s=work.read_s,
        tokenise_s=work.tokenise_s,
        write_s=work.write_s,
        device=device,
        host_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


_NO_ENGINE = BackendInfo(
    backend="none", device="none", dtype="none", max_model_len=0, max_num_seqs=0
)
