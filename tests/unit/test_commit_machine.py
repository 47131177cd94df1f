"""The commit protocol against thousands of interleavings, crashes and lost replies.

Workers move step by step; before or after any single store operation of a step, the worker may die,
its reply may get lost, or another worker may run its whole next step. Some hold leases, which expire as
time passes, or are lost; some never asked for one. What must hold is read from the store alone.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from storage import keys
from storage.attempts import PART, claim_attempt
from storage.clock import FrozenClock
from storage.commits import (
    CommitOutcome,
    all_commits,
    bury,
    commit_attempt,
    new_nonce,
    read_commits,
)
from storage.errors import AlreadyExists, LeaseLost, NotFound, StorageError, StoreUnavailable
from storage.garbage import Garbage, collect_garbage, withdraw
from storage.lease import Lease, Leases
from storage.manifest import CommitRecord, PartFile, RunManifest, digest
from storage.memory_store import MemoryStore
from storage.reveal import manifest_part, publish, read_manifest, reveal, unrevealed

PLAN = "sha256:plan"
NUM_SHARDS = 2
MAX_WORKERS = 4
TTL_S = 90.0
ACCIDENTS = [
    "",
    "overtake",
    "die before",
    "die after",
    "lose the request",
    "lose the reply",
    "fill the disk",
    "",
]


class Killed(Exception):
    """The worker is gone."""


class View:
    """One worker's connection to the store, with at most one accident ahead."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._countdown = 0
        self._accident: str | Callable[[], None] = ""

    def arm(self, countdown: int, accident: str | Callable[[], None]) -> None:
        self._countdown, self._accident = countdown, accident

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._store, name)
        if not callable(value):
            return value

        def operation(*args: Any, **more: Any) -> Any:
            self._countdown -= 1
            accident = self._accident if self._countdown == 0 else ""
            if callable(accident):
                accident()
            elif accident == "die before":
                raise Killed
            elif accident == "lose the request":
                raise StoreUnavailable("lost before")
            result = value(*args, **more)
            if accident == "die after":
                raise Killed
            if accident == "lose the reply":
                raise StoreUnavailable("lost after")
            return result

        return operation


class Protocol:
    """The product's own steps; planted bugs override one."""

    order = ("write", "commit", "reveal")

    def part_key(self, shard_id: int, attempt: int) -> str:
        return keys.attempt(shard_id, attempt, PART)

    def commit(self, store: Any, record: CommitRecord) -> CommitOutcome:
        return commit_attempt(store, record)

    def collect(self, store: Any) -> Garbage:
        return collect_garbage(store)

    def withdraw(self, store: Any, record: CommitRecord) -> bool:
        return withdraw(store, record)


class Worker:
    leases: Leases | None = None
    lease: Lease | None = None
    """None: it never asked, or has lost it; it works on all the same."""

    def __init__(self, protocol: Protocol, store: MemoryStore, shard_id: int, name: str) -> None:
        self.protocol = protocol
        self.store = View(store)
        self.steps = list(protocol.order)
        self.is_running = False
        revision = read_commits(store, PLAN).next_revision(shard_id)
        attempt = claim_attempt(store, shard_id, "invocation", name, revision=revision)
        self.data = f"shard {shard_id} by {name}".encode()
        self.record = CommitRecord(
            shard_id=shard_id,
            revision=revision,
            nonce=new_nonce(),
            attempt=attempt,
            plan_digest=PLAN,
            row_start=shard_id,
            row_end=shard_id + 1,
            part=PartFile(
                key=protocol.part_key(shard_id, attempt),
                size=len(self.data),
                sha256=digest(self.data),
                num_rows=1,
            ),
            counts={"ok": 1},
            receipt={},
            holder=name,
            committed_at="now",
        )
        self.outcome: CommitOutcome | None = None

    def step(self) -> None:
        """Take the next step; it is taken again when the store did not answer."""
        self.is_running = True
        try:
            match self.steps[0]:
                case "write":
                    self.store.put(self.record.part.key, self.data)
                case "commit":
                    self.outcome = self.protocol.commit(self.store, self.record)
                case "reveal":
                    assert self.outcome is not None
                    if self.outcome.record.tombstone is None:
                        reveal(self.store, self.outcome.record)
            self.steps.pop(0)
        finally:
            self.is_running = False


class CommitMachine(RuleBasedStateMachine):
    protocol = Protocol()

    def __init__(self) -> None:
        super().__init__()
        self.clock = FrozenClock()
        self.store = MemoryStore(clock=self.clock)
        self.workers: list[Worker] = []
        self.num_started = 0
        self.seen: dict[str, bytes] = {}
        self.claims: set[tuple[int, int]] = set()
        self.told_won: dict[tuple[int, int], set[str]] = {}

    @precondition(lambda self: len(self.workers) < MAX_WORKERS)
    @rule(shard_id=st.integers(0, NUM_SHARDS - 1), redo=st.booleans(), asks=st.booleans())
    def start(self, shard_id: int, redo: bool, asks: bool) -> None:
        if shard_id in read_commits(self.store, PLAN).current and not redo:
            return
        if not asks:  # a second start that knows of no lease
            self.start_worker(shard_id)
            return
        name = f"w{self.num_started + 1}"
        leases = Leases(self.store, holder=name, ttl_s=TTL_S, clock=self.clock)
        lease = leases.acquire(shard_id)
        if lease is not None:
            worker = self.start_worker(shard_id)
            worker.leases, worker.lease = leases, lease

    @rule(seconds=st.sampled_from([TTL_S / 4, TTL_S / 2, TTL_S * 2]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @precondition(lambda self: self.workers)
    @rule(index=st.integers(0, MAX_WORKERS - 1))
    def renew(self, index: int) -> None:
        worker = self.workers[index % len(self.workers)]
        if worker.leases is None or worker.lease is None:
            return
        try:
            worker.lease = worker.leases.renew(worker.lease)
        except LeaseLost:
            worker.lease = None
            return
        stored = worker.leases.find(worker.record.shard_id)
        assert stored is not None
        assert (stored.holder, stored.etag) == (worker.record.holder, worker.lease.etag)

    @rule(shard_id=st.integers(0, NUM_SHARDS - 1))
    def lose_a_lease(self, shard_id: int) -> None:
        self.store.delete(keys.lease(shard_id))

    @precondition(lambda self: self.workers)
    @rule(
        index=st.integers(0, MAX_WORKERS - 1),
        other=st.integers(0, MAX_WORKERS - 1),
        countdown=st.integers(1, 6),
        accident=st.sampled_from(ACCIDENTS),
    )
    def step(self, index: int, other: int, countdown: int, accident: str) -> None:
        worker = self.workers[index % len(self.workers)]
        rival = self.workers[other % len(self.workers)]
        if accident == "overtake":
            worker.store.arm(countdown, lambda: self.advance(rival))
        elif accident == "fill the disk":
            worker.store.arm(countdown, "lose the reply")
            self.advance(worker)
            self.give_up(worker)
            return
        elif accident:
            worker.store.arm(countdown, accident)
        self.advance(worker)

    @rule(countdown=st.integers(0, 8))
    def collect(self, countdown: int) -> None:
        view = View(self.store)
        view.arm(countdown, "die after")
        with suppress(Killed):
            self.protocol.collect(view)

    @rule(shard_id=st.integers(0, NUM_SHARDS - 1))
    def cancel(self, shard_id: int) -> None:
        revision = read_commits(self.store, PLAN).next_revision(shard_id)
        if revision < 4:
            bury(
                self.store, shard_id, plan_digest=PLAN, revision=revision, reason="x", holder="ops"
            )

    @rule()
    def publish(self) -> None:
        current = read_commits(self.store, PLAN).current
        if len(current) < NUM_SHARDS:
            return
        for record in unrevealed(self.store, current.values()):
            reveal(self.store, record)
        standing = read_manifest(self.store)
        publish(
            self.store,
            RunManifest(
                run_id="run",
                revision=1 if standing is None else standing.revision + 1,
                fingerprint="f",
                plan_digest=PLAN,
                num_shards=NUM_SHARDS,
                num_rows=NUM_SHARDS,
                counts={"ok": NUM_SHARDS},
                num_prompt_tokens=0,
                num_completion_tokens=0,
                parts=[manifest_part(record) for record in current.values()],
                totals={},
                published_at="now",
            ),
        )

    @invariant()
    def commits_and_manifests_never_change(self) -> None:
        found = {
            info.key: self.store.get(info.key)
            for info in self.store.list()
            if keys.parse_commit(info.key) or keys.parse_manifest(info.key)
        }
        for key, data in self.seen.items():
            assert found.get(key) == data, f"{key} changed"
        self.seen = found

    @invariant()
    def a_committed_part_is_there_as_promised(self) -> None:
        for record in all_commits(self.store):
            if record.tombstone is None:
                assert digest(self.store.get(record.part.key)) == record.part.sha256

    @invariant()
    def readers_see_committed_parts_only(self) -> None:
        committed = {
            (record.shard_id, record.part.sha256)
            for record in all_commits(self.store)
            if record.tombstone is None
        }
        for shard_id in range(NUM_SHARDS):
            try:
                data = self.store.get(keys.completions(shard_id))
            except NotFound:
                continue
            assert (shard_id, digest(data)) in committed

    def teardown(self) -> None:
        """Let the next invocation finish the run, as it would, and count the rows."""
        self.workers.clear()
        for shard_id in range(NUM_SHARDS):
            if shard_id not in read_commits(self.store, PLAN).current:
                worker = self.start_worker(shard_id)
                while worker in self.workers:
                    self.advance(worker)
        self.publish()
        self.protocol.collect(self.store)
        self.a_committed_part_is_there_as_promised()
        rows = Counter(
            self.store.get(info.key).split()[1] for info in self.store.list(keys.COMPLETIONS)
        )
        assert rows == {b"%d" % shard_id: 1 for shard_id in range(NUM_SHARDS)}
        for shard_id, record in read_commits(self.store, PLAN).current.items():
            assert digest(self.store.get(keys.completions(shard_id))) == record.part.sha256

    def start_worker(self, shard_id: int) -> Worker:
        self.num_started += 1
        worker = Worker(self.protocol, self.store, shard_id, f"w{self.num_started}")
        claim = (shard_id, worker.record.attempt)
        assert claim not in self.claims, f"attempt {claim} was given out twice"
        self.claims.add(claim)
        self.workers.append(worker)
        return worker

    def advance(self, worker: Worker) -> None:
        if worker.is_running or worker not in self.workers:
            return
        try:
            worker.step()
        except Killed:
            self.workers.remove(worker)
        except StoreUnavailable:
            return
        finally:
            self.check_what_was_told(worker)
        if not worker.steps and worker in self.workers:
            self.workers.remove(worker)
            if worker.leases is not None and worker.lease is not None:
                worker.leases.release(worker.lease)

    def give_up(self, worker: Worker) -> None:
        """Its disk is full, whether the write came through or not: it takes its files back, or some."""
        if "commit" in worker.steps and not worker.is_running:
            self.workers.remove(worker)
            with suppress(StoreUnavailable):
                self.protocol.withdraw(worker.store, worker.record)

    def check_what_was_told(self, worker: Worker) -> None:
        if worker.outcome is None:
            return
        record = worker.record
        key = keys.commit(record.shard_id, record.revision)
        standing = CommitRecord.from_json(self.store.get(key), source=key)
        assert worker.outcome.won == (standing.nonce == record.nonce), "told the wrong outcome"
        if worker.outcome.won:
            winners = self.told_won.setdefault((record.shard_id, record.revision), set())
            winners.add(record.nonce)
            assert len(winners) == 1


TestCommitMachine = CommitMachine.TestCase
TestCommitMachine.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def create(store: Any, record: CommitRecord) -> CommitOutcome:
    """A commit without the product's checks."""
    key = keys.commit(record.shard_id, record.revision)
    try:
        store.put_if_absent(key, record.to_json())
    except AlreadyExists:
        standing = CommitRecord.from_json(store.get(key), source=key)
        return CommitOutcome(won=standing.nonce == record.nonce, record=standing)
    return CommitOutcome(won=True, record=record)


class UnconditionalCommit(Protocol):
    def commit(self, store: Any, record: CommitRecord) -> CommitOutcome:
        store.put(keys.commit(record.shard_id, record.revision), record.to_json())
        return CommitOutcome(won=True, record=record)


class SharedDataKey(Protocol):
    def part_key(self, shard_id: int, attempt: int) -> str:
        return keys.attempt(shard_id, 1, PART)

    def commit(self, store: Any, record: CommitRecord) -> CommitOutcome:
        return create(store, record)


class CommitBeforeData(Protocol):
    order = ("commit", "write", "reveal")

    def commit(self, store: Any, record: CommitRecord) -> CommitOutcome:
        return create(store, record)


class RefusalTakenAsLoss(Protocol):
    def commit(self, store: Any, record: CommitRecord) -> CommitOutcome:
        key = keys.commit(record.shard_id, record.revision)
        try:
            return CommitOutcome(
                won=False, record=CommitRecord.from_json(store.get(key), source=key)
            )
        except NotFound:
            store.put_if_absent(key, record.to_json())
            return CommitOutcome(won=True, record=record)


class CollectionBlindToRevisions(Protocol):
    def collect(self, store: Any) -> Garbage:
        committed = {record.shard_id for record in all_commits(store)}
        live = {record.part.key for record in all_commits(store)}
        for info in list(store.list(keys.ATTEMPTS)):
            place = keys.parse_attempt(info.key)
            is_part = place and place.shard_id in committed and place.name == PART
            if is_part and info.key not in live:
                store.delete(info.key)
        return Garbage(keys=(), num_bytes=0, num_swept=0)


class WithdrawalWithoutALook(Protocol):
    def withdraw(self, store: Any, record: CommitRecord) -> bool:
        store.delete(record.part.key)
        return True


class CollectionOfClaims(Protocol):
    def collect(self, store: Any) -> Garbage:
        garbage = collect_garbage(store)
        committed = {(record.shard_id, record.attempt) for record in all_commits(store)}
        taken = {(record.shard_id, record.revision) for record in all_commits(store)}
        for info in list(store.list(keys.ATTEMPTS)):
            place = keys.parse_attempt(info.key)
            if place and (place.shard_id, 1) in taken and place[:2] not in committed:
                store.delete(info.key)
        return garbage


@pytest.mark.parametrize(
    "bug",
    [
        UnconditionalCommit,
        SharedDataKey,
        CommitBeforeData,
        RefusalTakenAsLoss,
        CollectionBlindToRevisions,
        CollectionOfClaims,
        WithdrawalWithoutALook,
    ],
)
def test_a_planted_bug_is_caught(bug: type[Protocol]) -> None:
    class Planted(CommitMachine):
        protocol = bug()

    with pytest.raises((AssertionError, StorageError)):
        run_state_machine_as_test(
            Planted,
            settings=settings(
                max_examples=2_000,  # it stops at the first that fails
                stateful_step_count=40,
                deadline=None,
                database=None,
                derandomize=True,
                report_multiple_bugs=False,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
