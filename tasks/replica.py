"""One replica: an engine that drains shards until none is left.

    claim -> read -> engine -> write and commit -> next

Only the engine runs in the caller's thread; whatever waits for the store or for rows does so in
another. The next shard's rows are read and submitted before this one's tail has drained, so the engine
does not idle between shards. Everything outside arrives as a parameter; Prefect is not known here.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from inference.errors import InferenceError
from storage.errors import AccessDenied, StorageError
from tasks.claiming import Claiming
from tasks.claims import Claim, Claims
from tasks.commit_shard import CommitResult, ShardCommitter
from tasks.latency import Latencies
from tasks.metrics import EngineReading
from tasks.progress import Progress
from tasks.read_shard import ShardReader
from tasks.replica_engine import ReplicaEngine
from tasks.results import count_states
from tasks.retry import ends_run, is_retryable
from tasks.shard_work import ShardWork
from tasks.stop import Stoppable, Stopped
from tasks.unforeseen import ShardFault, told

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

    claims: Claims
    reader: ShardReader
    engine: ReplicaEngine
    committer: ShardCommitter
    progress: Progress
    should_stop: Stoppable
    may_claim: Callable[[], bool] = lambda: True
    """Asked before every claim; False ends the drain once what is in hand is done."""

    _works: dict[int, ShardWork] = field(default_factory=dict)
    _claims_of: dict[int, Claim] = field(default_factory=dict)
    _claiming: Claiming = field(init=False)
    _reading: tuple[int, Future[None]] | None = None
    _committing: dict[int, Future[CommitResult]] = field(default_factory=dict)
    _outcomes: dict[int, ShardOutcome] = field(default_factory=dict)
    _suspects: set[int] = field(default_factory=set)
    """Shards that were in an engine when it broke: each runs alone from then on, so the one at fault shows."""

    _num_failed: int = 0
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_NUM_THREADS, "nightjar-replica")
    )

    def __post_init__(self) -> None:
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

    @property
    def latencies(self) -> Latencies:
        """How long rows took, from submission to completion."""
        return self.engine.latencies

    def reading(self) -> EngineReading:
        """Return what the engine is doing now; any thread may ask."""
        return self.engine.reading(num_failed_attempts=self._num_failed)

    def close(self) -> None:
        """Release leases and the engine. Safe to repeat; unfinished shards stay resumable."""
        self.reader.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.claims.close()
        self.engine.close()

    def _turn(self) -> None:
        self._take_claim()
        self._poll_reading()
        self._poll_commits()
        if self._can_take_more():
            self._claiming.ask(without=set(self._suspects))  # they run alone
        if self.engine.num_unfinished:
            self._step()
        else:
            self._wait()

    def _can_take_more(self) -> bool:
        if self._reading or len(self._works) >= _MAX_ACTIVE:
            return False
        if self._suspects & self._works.keys() or not self._claiming.makes_sense(self._suspects):
            return False
        return self.engine.has_room

    def _wait_for_claim(self, claiming: Future[Claim | None]) -> None:
        stage_s, self.committer.stage_s = self.committer.stage_s, 0.0
        self.engine.metering.begin(stage_s)
        started = time.monotonic()
        _wait_any([claiming])
        self.engine.metering.waited_for_claim(time.monotonic() - started)

    def _take_claim(self) -> bool:
        """Begin on a shard that was claimed; False while no answer has come."""
        answer = self._claiming.answer()
        if answer is not None and answer.claim is not None:
            self._begin(answer.claim)
        return answer is not None

    def _begin(self, claim: Claim) -> None:
        shard_id = claim.shard.shard_id
        work = self.reader.begin(claim)
        self._works[shard_id], self._claims_of[shard_id] = work, claim
        self.progress.shard("running")
        log.info(
            "shard=%05d attempt=%d rows=%d claimed", shard_id, work.attempt, work.shard.num_rows
        )
        self._reading = shard_id, self._threads.submit(self.reader.read, work, claim)

    def _poll_reading(self) -> None:
        if self._reading is None or not self._reading[1].done():
            return
        shard_id, future = self._reading
        self._reading = None
        try:
            future.result()
            work = self._works[shard_id]
            settled = work.settled
            sequences = work.sequences(lambda key: self.engine.register(shard_id, key))
        except Exception as error:
            self._fail(shard_id, _typed(error))
            return
        for result in settled:
            self.progress.row_done(result.state, 0)
        if sequences:
            try:
                self.engine.submit(sequences)
            except InferenceError as error:
                self._engine_failed(error)
                return
        if work.is_complete:
            self._commit(shard_id)

    def _step(self) -> None:
        try:
            finished = self.engine.step(may_grow=self._reading is not None)
        except InferenceError as error:
            self._engine_failed(error)
            return
        for shard_id, key, completion in finished:
            work = self._works.get(shard_id)
            if work is None:
                continue  # its attempt failed while it ran
            try:
                result = work.accept(key, completion)
            except Exception as error:
                self._fail(shard_id, _typed(error))
                continue
            self.progress.row_done(result.state, result.num_completion_tokens)
            if work.is_complete:
                self._commit(shard_id)

    def _engine_failed(self, error: InferenceError) -> None:
        """Fail every shard in the engine; go on with a fresh one if that can help."""
        concerned = self.engine.shard_ids & self._works.keys()
        self._suspects |= concerned
        for shard_id in sorted(concerned):
            self._fail(shard_id, error)
        self.engine.drop()
        if not error.retryable:
            raise error

    def _commit(self, shard_id: int) -> None:
        work = self._works[shard_id]
        backend = self.engine.backend if work.num_sequences else None
        if self._reading is None and not self.engine.num_unfinished:
            # Nothing else to do: the time of writing is this shard's, and nobody's who follows.
            started = time.monotonic()
            with contextlib.suppress(Exception):  # the commit thread meets it again, and reports it
                work.write()
            self.engine.metering.wrote(time.monotonic() - started)
        before, after = self.engine.metering.cut(self.engine.backend)
        claim = self._claims_of[shard_id]

        def commit() -> CommitResult:
            result = self.committer.commit(work, claim, backend, before, after)
            self.claims.release(shard_id, committed=True)
            return result

        self._committing[shard_id] = self._threads.submit(commit)

    def _poll_commits(self) -> None:
        for shard_id in [s for s, future in self._committing.items() if future.done()]:
            future = self._committing.pop(shard_id)
            try:
                result = future.result()
            except Exception as error:
                self._fail(shard_id, _typed(error))
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
            self.engine.metering.meter.starved(waited, self._works[self._reading[0]].tokenise_share)
        elif self._committing:
            self.engine.metering.wrote(waited)


def _typed(error: Exception) -> Exception:
    """Return an error as a shard's attempt may end with it. Raises Stopped, if it is that."""
    if isinstance(error, Stopped):
        raise error
    if isinstance(error, (StorageError, InferenceError, OSError, ShardFault)):
        return error
    fault = ShardFault(told(error))
    fault.__cause__ = error
    return fault


def _wait_any(futures: list[Any]) -> None:
    wait(futures, timeout=_IDLE_WAIT_S, return_when=FIRST_COMPLETED)
