import dataclasses
from collections.abc import Iterator

import pytest

from storage import keys
from storage.attempts import (
    FAILED,
    PART,
    attempts_of,
    claim_attempt,
    record_failure,
)
from storage.clock import FrozenClock
from storage.commits import (
    CommitCache,
    bury,
    commit_attempt,
    current_commits,
    new_nonce,
    read_commits,
)
from storage.errors import CorruptObject, FingerprintMismatch, StoreUnavailable
from storage.garbage import collect_garbage, withdraw
from storage.manifest import CommitRecord, PartFile, RunManifest, digest
from storage.memory_store import MemoryStore
from storage.object_store import ObjectInfo
from storage.reveal import manifest_part, publish, read_manifest, reveal, unrevealed

PLAN = "sha256:plan"


def attempt(
    store: MemoryStore, shard_id: int = 0, revision: int = 1, text: str = ""
) -> CommitRecord:
    """Claim an attempt and write its part; return the record it would commit."""
    number = claim_attempt(store, shard_id, "first", f"holder {text}", revision=revision)
    data = f"shard {shard_id} attempt {number} {text}".encode()
    key = keys.attempt(shard_id, number, PART)
    store.put(key, data)
    return CommitRecord(
        shard_id=shard_id,
        revision=revision,
        nonce=new_nonce(),
        attempt=number,
        plan_digest=PLAN,
        row_start=shard_id,
        row_end=shard_id + 1,
        part=PartFile(key=key, size=len(data), sha256=digest(data), num_rows=1),
        counts={"ok": 1},
        receipt={"seconds": 1.5},
        holder="holder",
        committed_at="2026-11-25T00:00:00Z",
    )


def test_the_first_commit_wins_and_the_second_learns_whose_it_is(memory_store: MemoryStore) -> None:
    first, second = attempt(memory_store), attempt(memory_store)
    assert commit_attempt(memory_store, first).won
    outcome = commit_attempt(memory_store, second)
    assert not outcome.won
    assert outcome.record == first
    assert current_commits(memory_store, PLAN) == {0: first}


def test_a_commit_repeated_after_a_lost_reply_is_still_ours(memory_store: MemoryStore) -> None:
    record = attempt(memory_store)
    assert commit_attempt(memory_store, record).won
    assert commit_attempt(memory_store, record).won
    later = dataclasses.replace(record, committed_at="2026-11-25T00:00:09Z")
    assert commit_attempt(memory_store, later).won


def test_nothing_is_committed_before_its_data(memory_store: MemoryStore) -> None:
    record = attempt(memory_store)
    memory_store.delete(record.part.key)
    with pytest.raises(CorruptObject, match="write it before the commit"):
        commit_attempt(memory_store, record)
    memory_store.put(record.part.key, b"short")
    with pytest.raises(CorruptObject, match="has 5 bytes, promised were"):
        commit_attempt(memory_store, record)
    assert current_commits(memory_store, PLAN) == {}


def test_an_attempt_commits_only_its_own_part_and_only_what_it_claimed(
    memory_store: MemoryStore,
) -> None:
    first, second = attempt(memory_store), attempt(memory_store)
    with pytest.raises(CorruptObject, match="not under its own prefix"):
        commit_attempt(memory_store, dataclasses.replace(first, part=second.part))
    with pytest.raises(CorruptObject, match="claimed for revision 1, not 2"):
        commit_attempt(memory_store, dataclasses.replace(first, revision=2))
    memory_store.delete(keys.attempt(0, first.attempt, "attempt.json"))
    with pytest.raises(CorruptObject, match="was never claimed"):
        commit_attempt(memory_store, first)


def test_a_loser_whose_files_were_collected_learns_that_it_lost(memory_store: MemoryStore) -> None:
    first, second = attempt(memory_store), attempt(memory_store)
    commit_attempt(memory_store, second)
    assert collect_garbage(memory_store).keys
    outcome = commit_attempt(memory_store, first)
    assert not outcome.won
    assert outcome.record == second


def test_the_highest_revision_counts(memory_store: MemoryStore) -> None:
    first = attempt(memory_store)
    commit_attempt(memory_store, first)
    assert read_commits(memory_store, PLAN).next_revision(0) == 2
    redone = attempt(memory_store, revision=2)
    assert commit_attempt(memory_store, redone).won
    assert current_commits(memory_store, PLAN) == {0: redone}
    assert read_commits(memory_store, PLAN).next_revision(0) == 3
    assert read_commits(memory_store, PLAN).next_revision(7) == 1


def test_a_commit_of_another_plan_is_not_counted_and_not_taken_for_a_lost_race(
    memory_store: MemoryStore,
) -> None:
    foreign = dataclasses.replace(attempt(memory_store), plan_digest="sha256:other")
    commit_attempt(memory_store, foreign)
    assert current_commits(memory_store, PLAN) == {}
    with pytest.raises(FingerprintMismatch, match="belongs to plan sha256:other"):
        commit_attempt(memory_store, attempt(memory_store))


def test_a_commit_is_fetched_once(frozen_clock: FrozenClock) -> None:
    store = CountingStore(clock=frozen_clock)
    for shard_id in range(3):
        commit_attempt(store, attempt(store, shard_id))
    cache: CommitCache = {}
    store.num_gets = 0
    first = current_commits(store, PLAN, cache=cache)
    assert store.num_gets == 3
    assert current_commits(store, PLAN, cache=cache) == first
    assert store.num_gets == 3


def test_a_damaged_commit_is_named_and_not_skipped(memory_store: MemoryStore) -> None:
    commit_attempt(memory_store, attempt(memory_store))
    memory_store.put(keys.commit(1), memory_store.get(keys.commit(0)))
    with pytest.raises(CorruptObject, match=r"commits/00001\.json: says shard 0"):
        current_commits(memory_store, PLAN)
    memory_store.put(keys.commit(1), b"{")
    with pytest.raises(CorruptObject, match=r"commits/00001\.json: not a CommitRecord"):
        current_commits(memory_store, PLAN)


def test_a_tombstone_fences_the_attempts_of_its_revision(memory_store: MemoryStore) -> None:
    zombie = attempt(memory_store)
    assert bury(memory_store, 0, plan_digest=PLAN, revision=1, reason="cancelled", holder="ops").won
    outcome = commit_attempt(memory_store, zombie)
    assert not outcome.won
    assert outcome.record.tombstone == "cancelled"
    assert current_commits(memory_store, PLAN) == {}
    assert zombie.part.key in collect_garbage(memory_store).keys
    resumed = attempt(memory_store, revision=read_commits(memory_store, PLAN).next_revision(0))
    assert commit_attempt(memory_store, resumed).won
    assert current_commits(memory_store, PLAN) == {0: resumed}
    with pytest.raises(ValueError, match="tombstone"):
        reveal(memory_store, outcome.record)


def test_a_shard_that_committed_before_cannot_be_buried(memory_store: MemoryStore) -> None:
    record = attempt(memory_store)
    commit_attempt(memory_store, record)
    outcome = bury(memory_store, 0, plan_digest=PLAN, revision=1, reason="cancelled", holder="ops")
    assert not outcome.won
    assert outcome.record == record


def test_attempt_numbers_grow_and_tell_who_and_why(
    memory_store: MemoryStore, frozen_clock: FrozenClock
) -> None:
    claim_attempt(memory_store, 3, "monday", "a", clock=frozen_clock)
    claim_attempt(memory_store, 3, "tuesday", "b", revision=2, clock=frozen_clock)
    assert claim_attempt(memory_store, 4, "monday", "a") == 1
    record_failure(memory_store, 3, 1, StoreUnavailable("503"), clock=frozen_clock)
    first, second = attempts_of(memory_store, 3)
    assert (first.attempt, first.invocation, first.holder, first.revision) == (1, "monday", "a", 1)
    assert first.failure is not None
    assert (first.failure.error, first.failure.message) == ("StoreUnavailable", "503")
    assert first.failure.retryable
    assert (second.attempt, second.invocation, second.revision) == (2, "tuesday", 2)
    assert second.failure is None
    assert second.claimed_at == "2027-01-15T08:00:00Z"


def test_two_claims_at_once_get_two_numbers(frozen_clock: FrozenClock) -> None:
    store = StaleListing(clock=frozen_clock)
    assert [claim_attempt(store, 0, "i", "h") for _ in range(3)] == [1, 2, 3]


def test_garbage_is_what_can_no_longer_become_real(memory_store: MemoryStore) -> None:
    lost, won, running = (attempt(memory_store, text=text) for text in ("lost", "won", "x"))
    record_failure(memory_store, 0, lost.attempt, StoreUnavailable("503"))
    undecided = attempt(memory_store, shard_id=1)
    assert collect_garbage(memory_store).keys == ()  # nothing is committed yet
    commit_attempt(memory_store, won)
    redoing = attempt(memory_store, revision=2)
    named = collect_garbage(memory_store, dry_run=True)
    assert memory_store.get(lost.part.key)
    done = collect_garbage(memory_store)
    assert done.keys == named.keys
    assert set(done.keys) == {
        keys.attempt(0, lost.attempt, name) for name in (PART, FAILED, "attempt.json")
    } | {keys.attempt(0, running.attempt, name) for name in (PART, "attempt.json")}
    assert done.num_bytes == named.num_bytes > 0
    for record in (won, undecided, redoing):
        assert memory_store.get(record.part.key)
    assert commit_attempt(memory_store, redoing).won
    assert collect_garbage(memory_store).keys == ()


def test_an_attempt_number_is_not_used_again_after_a_collection(memory_store: MemoryStore) -> None:
    records = [attempt(memory_store) for _ in range(3)]
    commit_attempt(memory_store, records[0])
    collect_garbage(memory_store)
    assert claim_attempt(memory_store, 0, "later", "h", revision=2) == 4


def test_what_a_zombie_writes_after_a_collection_is_collected_too(
    memory_store: MemoryStore,
) -> None:
    zombie, won = attempt(memory_store), attempt(memory_store)
    commit_attempt(memory_store, won)
    collect_garbage(memory_store)
    memory_store.put(zombie.part.key, b"late")
    assert collect_garbage(memory_store).keys == (zombie.part.key,)


def test_an_attempt_given_up_takes_back_all_but_its_claim(memory_store: MemoryStore) -> None:
    standing, record = attempt(memory_store), attempt(memory_store)
    assert withdraw(memory_store, record)
    left = [info.key for info in memory_store.list(keys.ATTEMPTS)]
    assert left == [
        keys.attempt(0, 1, "attempt.json"),
        standing.part.key,
        keys.attempt(0, 2, "attempt.json"),
    ]
    assert claim_attempt(memory_store, 0, "first", "holder") == 3


def test_a_committed_attempt_is_not_taken_back(memory_store: MemoryStore) -> None:
    first = attempt(memory_store)
    commit_attempt(memory_store, first)
    commit_attempt(memory_store, attempt(memory_store, revision=2))
    assert not withdraw(memory_store, first)
    assert memory_store.head(first.part.key).size == first.part.size


def test_revealing_copies_the_part_and_writes_the_receipt_once(frozen_clock: FrozenClock) -> None:
    store = CountingStore(clock=frozen_clock)
    record = attempt(store)
    commit_attempt(store, record)
    assert unrevealed(store, [record]) == [record]
    assert reveal(store, record) == record
    assert digest(store.get(keys.completions(0))) == record.part.sha256
    assert b'"seconds": 1.5' in store.get(keys.metrics(0))
    assert unrevealed(store, [record]) == []
    reveal(store, record)
    assert store.num_copies == 1


def test_a_slow_copier_of_an_old_revision_leaves_the_newest_standing(
    frozen_clock: FrozenClock,
) -> None:
    store = CountingStore(clock=frozen_clock)
    old = attempt(store, text="old")
    commit_attempt(store, old)
    new = attempt(store, revision=2, text="new")

    def overtake() -> None:
        commit_attempt(store, new)
        reveal(store, new)

    store.before_copy = iter([overtake])
    assert reveal(store, old) == new
    assert digest(store.get(keys.completions(0))) == new.part.sha256


def test_a_copy_overwritten_by_a_copier_that_died_is_found_and_mended(
    memory_store: MemoryStore,
) -> None:
    old = attempt(memory_store, text="old")
    commit_attempt(memory_store, old)
    new = attempt(memory_store, revision=2, text="new")
    commit_attempt(memory_store, new)
    reveal(memory_store, new)
    memory_store.copy(old.part.key, keys.completions(0))
    assert unrevealed(memory_store, [new]) == [new]
    reveal(memory_store, new)
    assert digest(memory_store.get(keys.completions(0))) == new.part.sha256


def test_a_part_that_is_gone_or_short_is_not_revealed(memory_store: MemoryStore) -> None:
    record = attempt(memory_store)
    commit_attempt(memory_store, record)
    memory_store.put(record.part.key, b"short")
    with pytest.raises(CorruptObject, match="5 bytes, the commit of attempt 1 promises"):
        reveal(memory_store, record)
    memory_store.delete(record.part.key)
    with pytest.raises(CorruptObject, match="a commit names it, but it is gone"):
        reveal(memory_store, record)


def test_publishing_happens_once_per_revision(memory_store: MemoryStore) -> None:
    assert read_manifest(memory_store) is None
    records = [attempt(memory_store, shard_id) for shard_id in range(2)]
    for record in records:
        commit_attempt(memory_store, record)
        reveal(memory_store, record)
    first = manifest_of(records)
    assert publish(memory_store, first).won
    later = publish(memory_store, dataclasses.replace(first, published_at="later"))
    assert not later.won
    assert later.manifest == first
    redone = attempt(memory_store, 1, revision=2)
    commit_attempt(memory_store, redone)
    reveal(memory_store, redone)
    second = manifest_of([records[0], redone], revision=2)
    assert publish(memory_store, second).won
    assert read_manifest(memory_store) == second
    with pytest.raises(ValueError, match="must follow the one before"):
        publish(memory_store, dataclasses.replace(second, revision=4))


def test_a_run_that_is_not_whole_is_not_published(memory_store: MemoryStore) -> None:
    records = [attempt(memory_store, shard_id) for shard_id in range(2)]
    for record in records:
        commit_attempt(memory_store, record)
        reveal(memory_store, record)
    whole = manifest_of(records)
    with pytest.raises(ValueError, match="has 1 parts"):
        publish(memory_store, dataclasses.replace(whole, parts=whole.parts[:1]))
    with pytest.raises(ValueError, match="3 rows"):
        publish(memory_store, dataclasses.replace(whole, num_rows=3))
    memory_store.delete(keys.completions(1))
    with pytest.raises(CorruptObject, match="no bytes instead of"):
        publish(memory_store, whole)
    assert read_manifest(memory_store) is None


def manifest_of(records: list[CommitRecord], revision: int = 1) -> RunManifest:
    return RunManifest(
        run_id="run",
        revision=revision,
        fingerprint="f",
        plan_digest=PLAN,
        num_shards=2,
        num_rows=2,
        counts={"ok": 2},
        num_prompt_tokens=0,
        num_completion_tokens=0,
        parts=[manifest_part(record) for record in records],
        totals={},
        published_at="now",
    )


class CountingStore(MemoryStore):
    """Counts reads and copies, and lets something happen just before a copy."""

    num_gets = 0
    num_copies = 0
    before_copy: Iterator[object] = iter(())

    def get(self, key: str) -> bytes:
        self.num_gets += 1
        return super().get(key)

    def copy(self, source: str, target: str, *, size: int | None = None) -> ObjectInfo:
        self.num_copies += 1
        action = next(self.before_copy, None)
        if callable(action):
            action()
        return super().copy(source, target, size=size)


class StaleListing(MemoryStore):
    """A claimer that does not see the claims made at the same time."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(())
