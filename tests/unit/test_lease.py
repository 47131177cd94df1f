import pytest

from storage import keys
from storage.clock import FrozenClock
from storage.errors import LeaseLost
from storage.lease import Leases
from storage.memory_store import MemoryStore


def holder(store: MemoryStore, name: str, clock: FrozenClock) -> Leases:
    return Leases(store, holder=name, ttl_s=60, clock=clock)


def test_a_held_shard_is_not_leased_twice(
    memory_store: MemoryStore, frozen_clock: FrozenClock
) -> None:
    a, b = holder(memory_store, "a", frozen_clock), holder(memory_store, "b", frozen_clock)
    lease = a.acquire(7)
    assert lease is not None
    assert (lease.holder, lease.fencing_token) == ("a", 1)
    assert lease.expires_at == frozen_clock.now() + 60
    assert b.acquire(7) is None
    assert b.acquire(8) is not None


def test_an_expired_lease_is_taken_over_and_its_late_holder_learns_it(
    memory_store: MemoryStore, frozen_clock: FrozenClock
) -> None:
    a, b = holder(memory_store, "a", frozen_clock), holder(memory_store, "b", frozen_clock)
    lost = a.acquire(7)
    assert lost is not None
    frozen_clock.advance(61)
    taken = b.acquire(7)
    assert taken is not None
    assert taken.fencing_token == 2
    with pytest.raises(LeaseLost, match=r"held by b \(fencing token 2\), ours was fencing token 1"):
        a.renew(lost)
    a.release(lost)
    assert b.renew(taken).holder == "b"


def test_a_renewed_lease_does_not_expire(
    memory_store: MemoryStore, frozen_clock: FrozenClock
) -> None:
    a, b = holder(memory_store, "a", frozen_clock), holder(memory_store, "b", frozen_clock)
    lease = a.acquire(7)
    for _ in range(5):
        frozen_clock.advance(50)
        assert lease is not None
        lease = a.renew(lease)
        assert lease.fencing_token == 1
        assert b.acquire(7) is None


def test_a_released_shard_is_free_at_once(
    memory_store: MemoryStore, frozen_clock: FrozenClock
) -> None:
    a, b = holder(memory_store, "a", frozen_clock), holder(memory_store, "b", frozen_clock)
    lease = a.acquire(7)
    assert lease is not None
    a.release(lease)
    taken = b.acquire(7)
    assert taken is not None
    assert taken.fencing_token == 2


@pytest.mark.parametrize("skew_s", [-10_000.0, 10_000.0])
def test_a_replica_whose_own_clock_is_wrong_neither_steals_nor_waits_longer(
    memory_store: MemoryStore, frozen_clock: FrozenClock, skew_s: float
) -> None:
    wrong_clock = FrozenClock(frozen_clock.now() + skew_s)
    a, b = holder(memory_store, "a", frozen_clock), holder(memory_store, "b", wrong_clock)
    assert a.acquire(7) is not None
    assert b.acquire(7) is None
    for clock in (frozen_clock, wrong_clock):
        clock.advance(59)
    assert b.acquire(7) is None
    for clock in (frozen_clock, wrong_clock):
        clock.advance(2)
    assert b.acquire(7) is not None


def test_of_two_takers_of_an_expired_lease_one_gets_it(
    memory_store: MemoryStore, frozen_clock: FrozenClock
) -> None:
    holder(memory_store, "a", frozen_clock).acquire(7)
    frozen_clock.advance(61)
    b, c = holder(memory_store, "b", frozen_clock), holder(memory_store, "c", frozen_clock)
    seen_by_b = b.find(7)
    assert c.acquire(7) is not None
    b.find = lambda shard_id: seen_by_b  # type: ignore[method-assign]
    assert b.acquire(7) is None


def test_a_lease_that_cannot_be_read_is_free(
    memory_store: MemoryStore, frozen_clock: FrozenClock
) -> None:
    memory_store.put(keys.lease(7), b"{")
    assert holder(memory_store, "a", frozen_clock).acquire(7) is not None


def test_renewing_a_lease_that_was_deleted_is_losing_it(
    memory_store: MemoryStore, frozen_clock: FrozenClock
) -> None:
    a = holder(memory_store, "a", frozen_clock)
    lease = a.acquire(7)
    assert lease is not None
    memory_store.delete(keys.lease(7))
    with pytest.raises(LeaseLost, match="held by nobody"):
        a.renew(lease)
