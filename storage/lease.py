"""Leases: who is working on a shard now. They save GPU time and nothing else rests on them.

    free --acquire--> held --release--> free
      ^                |
      +----expire------+     a late holder's renewal raises LeaseLost; if it commits all the same,
                             the create-only commit decides as ever

Expiry is judged by the store's clock: the time the lease was last written, as the store tells it, plus
the lease's own length, against the store's present, which is learnt from a small write. So a replica
whose clock is wrong neither steals nor keeps a shard.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from storage import keys
from storage.clock import Clock, SystemClock
from storage.errors import AlreadyExists, LeaseLost, NotFound, PreconditionFailed
from storage.manifest import FORMAT, to_json
from storage.object_store import ObjectInfo, ObjectStore

_RESYNC_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A time-limited claim on a shard."""

    shard_id: int
    holder: str
    """Empty once released."""

    fencing_token: int
    """Grows with every holder of the shard."""

    expires_at: float
    """By the store's clock, seconds since the epoch."""

    etag: str
    """Of the stored lease; whoever wants to replace it must know it."""


class Leases:
    """One holder's leases in one run folder. May be used by several threads."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        holder: str,
        ttl_s: float = 90.0,
        clock: Clock | None = None,
        is_dead: Callable[[str], bool] = lambda holder: False,
    ) -> None:
        """Hold leases as `holder`, which must be unlike every other process's.

        Args:
            store: The run folder.
            holder: Our name.
            ttl_s: How long a lease lasts unrenewed, in seconds.
            clock: Ours; only differences are used.
            is_dead: Says of a holder's name whether it surely no longer lives; its lease is free.
        """
        self._store = store
        self._holder = holder
        self._ttl_s = ttl_s
        self._clock = clock or SystemClock()
        self._is_dead = is_dead
        self._reference: tuple[float, float] | None = None  # store's time, monotonic time

    def acquire(self, shard_id: int) -> Lease | None:
        """Take the shard if nobody holds it; None if somebody does or was quicker."""
        found = self.find(shard_id)
        if found is None:
            return self._create(shard_id)
        if self._is_taken(found):
            return None
        try:
            return self._swap(found, holder=self._holder, fencing_token=found.fencing_token + 1)
        except (PreconditionFailed, NotFound):
            return None

    def renew(self, lease: Lease) -> Lease:
        """Hold on for another `ttl_s` and return the lease as it is now.

        Raises:
            LeaseLost: somebody else took the shard after the lease had expired.
        """
        try:
            return self._swap(lease, holder=self._holder, fencing_token=lease.fencing_token)
        except (PreconditionFailed, NotFound) as error:
            current = self.find(lease.shard_id)
            owner = (
                "nobody"
                if current is None
                else f"{current.holder or 'nobody'} (fencing token {current.fencing_token})"
            )
            raise LeaseLost(
                f"shard {lease.shard_id}: lease held by {owner}, ours was fencing token "
                f"{lease.fencing_token}; this attempt's output is left uncommitted"
            ) from error

    def release(self, lease: Lease) -> None:
        """Let go, so that nobody has to wait for the expiry; a lost lease is left alone."""
        try:
            self._swap(lease, holder="", fencing_token=lease.fencing_token)
        except (PreconditionFailed, NotFound):
            return

    def find(self, shard_id: int) -> Lease | None:
        """Return the stored lease, whoever holds it, expired or not; None if there never was one."""
        key = keys.lease(shard_id)
        try:
            # If it is replaced between the two reads, a swap by the older ETag fails, as it must.
            info = self._store.head(key)
            value = json.loads(self._store.get(key))
            return _lease(shard_id, value, info)
        except NotFound:
            return None
        except (ValueError, KeyError, TypeError):
            # Nothing rests on a lease: one that cannot be read is one that is free.
            return Lease(
                shard_id=shard_id, holder="", fencing_token=0, expires_at=0.0, etag=info.etag
            )

    def is_taken(self, shard_id: int) -> bool:
        """Whether somebody else works on the shard now, as far as the lease tells."""
        found = self.find(shard_id)
        return found is not None and self._is_taken(found)

    def _is_taken(self, lease: Lease) -> bool:
        if lease.holder in {"", self._holder} or self._is_dead(lease.holder):
            return False
        return self._store_now() < lease.expires_at

    def _create(self, shard_id: int) -> Lease | None:
        value = self._value(holder=self._holder, fencing_token=1)
        try:
            info = self._store.put_if_absent(keys.lease(shard_id), to_json(value))
        except AlreadyExists:
            return None
        return _lease(shard_id, value, info)

    def _swap(self, lease: Lease, *, holder: str, fencing_token: int) -> Lease:
        value = self._value(holder=holder, fencing_token=fencing_token)
        info = self._store.put_if_match(keys.lease(lease.shard_id), to_json(value), lease.etag)
        return _lease(lease.shard_id, value, info)

    def _value(self, *, holder: str, fencing_token: int) -> dict[str, object]:
        return {
            "format": FORMAT,
            "holder": holder,
            "fencing_token": fencing_token,
            "ttl_s": self._ttl_s if holder else 0.0,
            "nonce": secrets.token_hex(8),
        }

    def _store_now(self) -> float:
        """The store's time, learnt by a write now and then."""
        monotonic = self._clock.monotonic()
        if self._reference is None or monotonic - self._reference[1] > _RESYNC_S:
            info = self._store.put(keys.LEASE_CLOCK, b"")
            self._reference = (info.modified_at, monotonic)
        return self._reference[0] + monotonic - self._reference[1]


def _lease(shard_id: int, value: dict[str, object], info: ObjectInfo) -> Lease:
    return Lease(
        shard_id=shard_id,
        holder=str(value["holder"]),
        fencing_token=int(str(value["fencing_token"])),
        expires_at=info.modified_at + float(str(value["ttl_s"])),
        etag=info.etag,
    )
