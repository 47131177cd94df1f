"""One replica: an engine that drains shards until none is left.

    claim -> read -> engine -> write and commit -> next

Only the engine runs in the caller's thread; whatever waits for the store or for rows does so in
another. The next shard's rows are read and submitted before this one's tail has drained, so the engine
does not idle between shards. Everything outside arrives as a parameter; Prefect is not known here.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from inference.backends.base import Backend
from inference.errors import InferenceError
from storage.errors import AccessDenied, StorageError
from storage.manifest import PlanManifest, Shard
from tasks.canary import Kept
from tasks.claiming import Claiming
from tasks.claims import Claim, Claims
from tasks.commit_shard import CommitResult, ShardCommitter
from tasks.feed import PreparedBatch, PromptFeed
from tasks.latency import Latencies
from tasks.metering import Meter, Metering
from tasks.metrics import EngineReading
from tasks.progress import Progress
from tasks.results import ResultColumns, count_states
from tasks.retry import ends_run, is_retryable
from tasks.reuse import ReuseIndex
from tasks.shard_answers import ShardAnswers
from tasks.shard_work import SampleKey, ShardWork
from tasks.stop import Stoppable, Stopped

log = logging.getLogger("nightjar.replica")

_MAX_ACTIVE = 3  # one draining, one running, one being read
_NUM_THREADS = 3  # one claims or reads, the others commit
_IDLE_WAIT_S = 0.05


class Outcome(StrEnum):
    """How one attempt at one shard ended."""

    COMMITTED = "committed"
    LOST = "lost"  # another attempt committed first; its result stands
    UNCHANGED = "unchanged"  # a retry improved nothing; the old revision stands
    FAILED = "failed"


class ShardOutcome(NamedTuple):
    """What `finish_shard` reports."""

    shard_id: int
    outcome: Outcome
    error: str | None = None


@dataclass(slots=True, kw_only=True)
class Replica:
    """An engine and the shards it has in hand. One thread drives it; `close` releases everything."""

    plan: PlanManifest
    claims: Claims
    feed: PromptFeed
    committer: ShardCommitter
    build_backend: Callable[[], Backend]
    take_waited_s: Callable[[], float] = lambda: 0.0
    """Seconds that the engine built last has waited for weights to be staged."""

    columns: ResultColumns
    input_schema: Any
    work_dir: Path
    progress: Progress
    should_stop: Stoppable
    kept: Kept = field(default_factory=dict)
    """Answers of the canary."""

    spent: Meter = field(default_factory=Meter)
    """What the engine that is taken over has cost so far: its start and the canary."""

    engine: bytes = b""
    """See `tasks.content.engine_digest`."""

    reuse: ReuseIndex | None = None
    """Answers of earlier runs."""

    may_claim: Callable[[], bool] = lambda: True
    """Asked before every claim; False ends the drain once what is in hand is done."""

    latencies: Latencies = field(default_factory=Latencies)
    _backend: Backend | None = None
    _works: dict[int, ShardWork] = field(default_factory=dict)
    _claims_of: dict[int, Claim] = field(default_factory=dict)
    _owners: dict[int, tuple[int, SampleKey, float]] = field(default_factory=dict)
    _claiming: Claiming = field(init=False)
    _reading: tuple[int, Future[None]] | None = None
    _committing: dict[int, Future[CommitResult]] = field(default_factory=dict)
    _outcomes: dict[int, ShardOutcome] = field(default_factory=dict)
    _suspects: set[int] = field(default_factory=set)
    """Shards that were in an engine when it broke: each runs alone from then on, so the one at fault shows."""

    _next_seq_id: int = 0
    _num_failed: int = 0
    _metering: Metering = field(init=False)
    _closing: threading.Event = field(default_factory=threading.Event)
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_NUM_THREADS, "nightjar-replica")
    )

    def __post_init__(self) -> None:
        self._metering = Metering(self.spent)
        self._claiming = Claiming(
            claims=self.claims, threads=self._threads, may_claim=self.may_claim
        )

    def next_shard(self) -> int | None:
        """Return a shard that ended, or the oldest in hand, or a fresh one; None when all are taken.

        Shards that failed here and may be tried again are waited for, and so is a store that is away.

        Raises:
            Stopped: `should_stop` was set.
            StorageError: no shard can be claimed, for a reason that does not pass.
        """
        while not self._works and not self._outcomes:
            if self.should_stop.is_set():
                raise Stopped
            self._wait_for_claim(self._claiming.ask())
            if self._take_claim() and not self._works:
                pause_s = self._claiming.pause_s
                if pause_s is None:
                    return None
                time.sleep(min(pause_s, _IDLE_WAIT_S))
        return next(iter(self._outcomes or self._works))

    def finish_shard(self, shard_id: int) -> ShardOutcome:
        """Run until this shard's attempt ends; later shards progress meanwhile.

        Raises:
            Stopped: `should_stop` was set.
            InferenceError: fatal for the whole run, such as a model that cannot be loaded.
        """
        while shard_id not in self._outcomes:
            if self.should_stop.is_set():
                raise Stopped
            self._turn()
        return self._outcomes.pop(shard_id)

    def reading(self) -> EngineReading:
        """Return what the engine is doing now; any thread may ask."""
        backend = self._backend
        if backend is None:
            return EngineReading(num_failed_attempts=self._num_failed)
        waiting, stats = backend.num_waiting, backend.stats
        return EngineReading(
            num_running=max(0, backend.num_unfinished - waiting),
            num_waiting=waiting,
            kv_occupancy=stats.kv_occupancy,
            num_prompt_tokens=stats.num_prompt_tokens,
            num_cached_tokens=stats.num_cached_tokens,
            num_completion_tokens=stats.num_completion_tokens,
            num_preemptions=stats.num_preemptions,
            num_failed_attempts=self._num_failed,
        )

    def close(self) -> None:
        """Release leases and the engine. Safe to repeat; unfinished shards stay resumable."""
        self._closing.set()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.claims.close()
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def _turn(self) -> None:
        self._take_claim()
        self._poll_reading()
        self._poll_commits()
        if self._can_take_more():
            self._claiming.ask(without=set(self._suspects))  # they run alone
        backend = self._backend
        if backend is not None and backend.num_unfinished:
            self._step(backend)
        else:
            self._wait()

    def _can_take_more(self) -> bool:
        if self._reading or len(self._works) >= _MAX_ACTIVE:
            return False
        if self._suspects & self._works.keys() or not self._claiming.makes_sense(self._suspects):
            return False
        if self._backend is None or not self._backend.num_unfinished:
            return True
        return self._backend.num_waiting <= self._backend.info.max_num_seqs

    def _wait_for_claim(self, claiming: Future[Claim | None]) -> None:
        stage_s, self.committer.stage_s = self.committer.stage_s, 0.0
        self._metering.begin(stage_s)
        started = time.monotonic()
        _wait_any([claiming])
        self._metering.waited_for_claim(time.monotonic() - started)

    def _take_claim(self) -> bool:
        """Begin on a shard that was claimed; False while no answer has come."""
        answer = self._claiming.answer()
        if answer is not None and answer.claim is not None:
            self._begin(answer.claim)
        return answer is not None

    def _begin(self, claim: Claim) -> None:
        shard_id = claim.shard.shard_id
        work = ShardWork(
            shard=claim.shard,
            attempt=claim.attempt,
            folder=self.work_dir / f"shard-{shard_id:05d}-{claim.attempt:03d}",
            columns=self.columns,
            input_schema=self.input_schema,
            num_samples=self.plan.num_samples,
            answers=ShardAnswers(
                engine=self.engine, num_samples=self.plan.num_samples, index=self.reuse
            ),
            kept=self.kept,
            started_at=time.monotonic(),
        )
        self._works[shard_id], self._claims_of[shard_id] = work, claim
        self.progress.shard("running")
        log.info(
            "shard=%05d attempt=%d rows=%d claimed", shard_id, work.attempt, work.shard.num_rows
        )
        self._reading = shard_id, self._threads.submit(self._read, work, claim)

    def _read(self, work: ShardWork, claim: Claim) -> None:
        started = time.monotonic()
        work.base = self.committer.fetch_base(claim, work.folder)
        work.read(self._until_closed(work.shard))
        work.read_s = time.monotonic() - started

    def _until_closed(self, shard: Shard) -> Iterator[PreparedBatch]:
        for batch in self.feed.read(self.plan, shard.row_start, shard.row_end):
            if self._closing.is_set():
                raise Stopped
            yield batch

    def _poll_reading(self) -> None:
        if self._reading is None or not self._reading[1].done():
            return
        shard_id, future = self._reading
        self._reading = None
        try:
            future.result()
        except (StorageError, InferenceError, OSError) as error:
            self._fail(shard_id, error)
            return
        work = self._works[shard_id]
        for result in work.settled:
            self.progress.row_done(result.state, 0)
        sequences = work.sequences(lambda key: self._register(shard_id, key))
        if sequences:
            try:
                self._engine().submit(sequences)
            except InferenceError as error:
                self._engine_failed(error)
                return
        if work.is_complete:
            self._commit(shard_id)

    def _register(self, shard_id: int, key: SampleKey) -> int:
        seq_id = self._next_seq_id
        self._next_seq_id += 1
        self._owners[seq_id] = shard_id, key, time.monotonic()
        return seq_id

    def _engine(self) -> Backend:
        if self._backend is None:
            self.progress.phase = "loading the model"
            started = time.monotonic()
            self._backend = self.build_backend()
            self._metering.built(
                self._backend, time.monotonic() - started, staging_s=self.take_waited_s()
            )
            self.progress.phase = "generating"
        return self._backend

    def _step(self, backend: Backend) -> None:
        # Nothing waits and nothing is being read: from here on the batch only shrinks.
        is_tail = (
            self._reading is None
            and not backend.num_waiting
            and backend.num_unfinished < backend.info.max_num_seqs
        )
        started, decoded_s = time.monotonic(), backend.stats.decode_s
        num_running, num_steps = backend.num_unfinished, backend.stats.num_steps
        try:
            completions = backend.step()
        except InferenceError as error:
            self._engine_failed(error)
            return
        stepped = time.monotonic()
        tail_s = backend.stats.decode_s - decoded_s if is_tail else 0.0
        tail_tokens = num_running * (backend.stats.num_steps - num_steps) if tail_s > 0 else 0
        self._metering.stepped(stepped - started, tail_s=tail_s, tail_tokens=tail_tokens)
        for completion in completions:
            shard_id, key, submitted_at = self._owners.pop(completion.seq_id)
            self.latencies.add(stepped - submitted_at)
            work = self._works.get(shard_id)
            if work is None:
                continue  # its attempt failed while it ran
            result = work.accept(key, completion)
            self.progress.row_done(result.state, result.num_completion_tokens)
            if work.is_complete:
                self._commit(shard_id)

    def _engine_failed(self, error: InferenceError) -> None:
        """Fail every shard in the engine; go on with a fresh one if that can help."""
        concerned = {owner[0] for owner in self._owners.values()} & self._works.keys()
        self._suspects |= concerned
        for shard_id in sorted(concerned):
            self._fail(shard_id, error)
        self._owners.clear()
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        self._metering.restart()
        if not error.retryable:
            raise error

    def _commit(self, shard_id: int) -> None:
        work = self._works[shard_id]
        backend = self._engine_if_used(work)
        if self._reading is None and not (self._backend and self._backend.num_unfinished):
            # Nothing else to do: the time of writing is this shard's, and nobody's who follows.
            started = time.monotonic()
            with contextlib.suppress(
                OSError, StorageError
            ):  # the commit thread meets it again, and reports it
                work.write()
            self._metering.wrote(time.monotonic() - started)
        before, after = self._metering.cut(self._backend)
        claim = self._claims_of[shard_id]

        def commit() -> CommitResult:
            result = self.committer.commit(work, claim, backend, before, after)
            self.claims.release(shard_id, committed=True)
            return result

        self._committing[shard_id] = self._threads.submit(commit)

    def _engine_if_used(self, work: ShardWork) -> Backend | None:
        return self._backend if work.num_sequences else None

    def _poll_commits(self) -> None:
        for shard_id in [s for s, future in self._committing.items() if future.done()]:
            future = self._committing.pop(shard_id)
            try:
                result = future.result()
            except (StorageError, OSError) as error:
                self._fail(shard_id, error)
                if isinstance(error, AccessDenied):
                    raise  # of the run folder: no other shard can be committed either
                continue
            self._done(shard_id, Outcome(result.outcome))

    def _fail(self, shard_id: int, error: Exception) -> None:
        work = self._works[shard_id]
        self._num_failed += 1
        log.warning("shard=%05d attempt=%d failed: %s", shard_id, work.attempt, error)
        self.progress.note(f"shard {shard_id:05d}, attempt {work.attempt}: {error}")
        self.progress.rows_undone(count_states(list(work.results.values())))
        self.claims.failed(shard_id, error, retryable=is_retryable(error))
        self.claims.release(shard_id, committed=False)
        self._done(shard_id, Outcome.FAILED, str(error))
        if ends_run(error):
            raise error

    def _done(self, shard_id: int, outcome: Outcome, error: str | None = None) -> None:
        work = self._works.pop(shard_id)
        del self._claims_of[shard_id]
        work.discard()
        state = "failed" if outcome is Outcome.FAILED else "committed"
        self.progress.shard(state, was="running")
        self._outcomes[shard_id] = ShardOutcome(shard_id, outcome, error)

    def _wait(self) -> None:
        """Nothing to run: wait briefly for rows or for a commit."""
        started = time.monotonic()
        pending: list[Future[Any]] = [*self._committing.values()]
        if self._reading:
            pending.append(self._reading[1])
        elif self._claiming.future:
            pending.append(self._claiming.future)
        if pending:
            _wait_any(pending)
        else:
            time.sleep(_IDLE_WAIT_S)
        waited = time.monotonic() - started
        if self._reading:
            self._metering.meter.starved(waited, self._works[self._reading[0]].tokenise_share)
        elif self._committing:
            self._metering.wrote(waited)


def _wait_any(futures: list[Any]) -> None:
    wait(futures, timeout=_IDLE_WAIT_S, return_when=FIRST_COMPLETED)
