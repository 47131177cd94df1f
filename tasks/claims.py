"""Which shard next: leases held by this replica, tries counted per invocation.

    pending --next--> held --release--> committed | failed (tried again later, or exhausted)

Leases only save GPU time. Whether a shard is done is asked of its commit, never of its lease.
"""

import logging
import math
import random
import threading
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from storage import keys
from storage.attempts import Attempt, attempts_of, claim_attempt, record_failure
from storage.commits import Commits
from storage.errors import LeaseLost, NotFound, StorageError
from storage.failpoints import failpoint
from storage.lease import Lease, Leases
from storage.manifest import CommitRecord, Shard
from storage.object_store import ObjectStore
from tasks.cancel import is_cancelled

log = logging.getLogger("nightjar.claims")

_RENEW_EVERY_S = 20.0
_BACKOFF_S = 2.0
_LOOK_AGAIN_S = (
    2.0  # after there was nothing to be had: the engine must not wait for the store at every step
)


class Claim(NamedTuple):
    """A shard this replica may work on now."""

    shard: Shard
    attempt: int
    revision: int  # of the commit this attempt is for
    base: CommitRecord | None  # what a retry starts from


@dataclass(slots=True, kw_only=True)
class Claims:
    """Hands out shards one at a time and keeps their leases alive in a thread."""

    store: ObjectStore
    shards: Sequence[Shard]
    """What is left to do, in the order wanted."""

    leases: Leases
    invocation: str
    """Identifies one start of the run over all its replicas: tries are bounded within it."""

    max_attempts: int
    commits: Commits
    """What was committed when this drain began; decides the revision an attempt is for."""

    holder: str
    bases: Mapping[int, CommitRecord] = field(default_factory=dict)
    """For a retry of failed rows: the commits to improve on."""

    claim_until: float = math.inf
    """Monotonic time after which no further shard is claimed."""

    exhausted: dict[int, str] = field(default_factory=dict)
    """Shards given up in this invocation, with the last error."""

    is_cancelled: bool = False
    """Somebody has cancelled the run; what is in hand is finished, nothing else is begun."""

    _pending: dict[int, Shard] = field(init=False)
    _held: dict[int, Lease] = field(default_factory=dict)
    _attempts: dict[int, int] = field(default_factory=dict)
    _failures: dict[int, int] = field(default_factory=dict)
    _not_before: dict[int, float] = field(default_factory=dict)
    _look_at: float = 0.0
    _others_seen: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: threading.Event = field(default_factory=threading.Event)
    _renewer: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._pending = {shard.shard_id: shard for shard in self.shards}

    @property
    def num_pending(self) -> int:
        """Shards neither committed, held here, nor given up."""
        return len(self._pending)

    def next(self, without: Set[int] = frozenset()) -> Claim | None:
        """Claim the next free shard; None when none can be had now. Raises StorageError.

        After None the store is left in peace for a moment, however often this is called.

        Args:
            without: Shards not wanted now.
        """
        if not self.may_have_more(without):
            return None
        now = time.monotonic()
        self.is_cancelled = is_cancelled(self.store, self.invocation)
        if self.is_cancelled:
            log.info("invocation=%s is cancelled; no further shard is claimed", self.invocation)
        if self.is_cancelled or now > self.claim_until:
            self._pending.clear()
        if self._others_seen:
            self._drop_committed()
        for shard in [s for s in self._pending.values() if s.shard_id not in without]:
            claim = self._try(shard)
            if claim is not None:
                return claim
        self._look_at = min([now + _LOOK_AGAIN_S, *filter(lambda at: at > now, self._backoffs())])
        return None

    def may_have_more(self, without: Set[int] = frozenset()) -> bool:
        """Whether asking for a shard that is not in `without` makes sense now."""
        return time.monotonic() >= self._look_at and not self._pending.keys() <= without

    def look_again_in(self, pause_s: float) -> None:
        """Leave the store in peace for so long."""
        self._look_at = time.monotonic() + pause_s

    @property
    def backoff_s(self) -> float | None:
        """Seconds until a shard that failed here may be tried again; None when there is none."""
        waits = self._backoffs()
        return max(0.0, max(min(waits), self._look_at) - time.monotonic()) if waits else None

    def release(self, shard_id: int, *, committed: bool) -> None:
        """Give the lease back; a shard that is not committed becomes pending again."""
        with self._lock:
            lease = self._held.pop(shard_id, None)
        if lease is not None:
            self._release_lease(lease)
        if committed or shard_id in self.exhausted:
            return
        shard = next(s for s in self.shards if s.shard_id == shard_id)
        self._pending[shard_id] = shard

    def failed(self, shard_id: int, error: Exception, *, retryable: bool) -> None:
        """Count a failed attempt; give the shard up when trying again is useless or used up."""
        attempt = self._attempts[shard_id]
        self._failures[shard_id] = self._failures.get(shard_id, 0) + 1
        tries = self._failures[shard_id]
        try:
            record_failure(self.store, shard_id, attempt, error, retryable=retryable)
            tries = len(self._own(attempts_of(self.store, shard_id)))
        except StorageError as trouble:
            # The note is for people; what counts is the shard, and that this store may come back.
            log.warning(
                "shard=%05d attempt=%d failure not recorded: %s", shard_id, attempt, trouble
            )
        if not retryable or tries >= self.max_attempts:
            self.exhausted[shard_id] = str(error)
        self._not_before[shard_id] = time.monotonic() + _BACKOFF_S**tries * random.uniform(0.5, 1)

    def close(self) -> None:
        """Release every lease still held. Safe to repeat."""
        self._closed.set()
        with self._lock:
            held, self._held = list(self._held.values()), {}
        for lease in held:
            self._release_lease(lease)

    def _try(self, shard: Shard) -> Claim | None:
        shard_id = shard.shard_id
        if time.monotonic() < self._not_before.get(shard_id, 0.0):
            return None
        revision = self.commits.next_revision(shard_id)
        lease = self.leases.acquire(shard_id)
        if lease is None:
            self._others_seen = True
            self._pending[shard_id] = self._pending.pop(shard_id)  # asked last from now on
            return None
        failpoint("after_lease")
        with self._lock:
            self._held[shard_id] = lease
        # Asked after the lease is ours: whoever committed did so before giving it back.
        attempts = attempts_of(self.store, shard_id)
        if self._exists(keys.commit(shard_id, revision)) or self._is_exhausted(shard_id, attempts):
            self._others_seen = True
            del self._pending[shard_id]
            self.release(shard_id, committed=True)
            return None
        attempt = claim_attempt(
            self.store,
            shard_id,
            self.invocation,
            self.holder,
            revision=revision,
            after=max((attempt.attempt for attempt in attempts), default=0),
        )
        self._attempts[shard_id] = attempt
        del self._pending[shard_id]
        self._keep_alive()
        return Claim(shard, attempt, revision, self.bases.get(shard_id))

    def _drop_committed(self) -> None:
        """Forget what other replicas have committed meanwhile: one listing instead of a visit to each."""
        self._others_seen = False
        for info in self.store.list(keys.COMMITS):
            place = keys.parse_commit(info.key)
            if place and place.revision >= self.commits.next_revision(place.shard_id):
                self._pending.pop(place.shard_id, None)

    def _is_exhausted(self, shard_id: int, attempts: list[Attempt]) -> bool:
        """Whether this invocation, in whichever process, has done for this shard what it may."""
        own = self._own(attempts)
        failures = [attempt.failure for attempt in own if attempt.failure is not None]
        if len(own) < self.max_attempts and all(failure.retryable for failure in failures):
            return False
        last = failures[-1].message if failures else f"{len(own)} attempts died"
        self.exhausted.setdefault(shard_id, last)
        return True

    def _own(self, attempts: list[Attempt]) -> list[Attempt]:
        """This invocation's attempts, those included that died without a word."""
        return [attempt for attempt in attempts if attempt.invocation == self.invocation]

    def _backoffs(self) -> list[float]:
        return [at for shard_id, at in self._not_before.items() if shard_id in self._pending]

    def _exists(self, key: str) -> bool:
        try:
            self.store.head(key)
        except NotFound:
            return False
        return True

    def _keep_alive(self) -> None:
        if self._renewer is None:
            self._renewer = threading.Thread(
                target=self._renew_all, name="nightjar-leases", daemon=True
            )
            self._renewer.start()

    def _renew_all(self) -> None:
        while not self._closed.wait(_RENEW_EVERY_S):
            with self._lock:
                held = dict(self._held)
            for shard_id, lease in held.items():
                try:
                    renewed = self.leases.renew(lease)
                except LeaseLost as error:
                    # The commit decides who wins; going on wastes at most one shard of GPU time.
                    log.warning("shard=%05d %s", shard_id, error)
                    continue
                except StorageError as error:
                    log.warning("shard=%05d lease not renewed: %s", shard_id, error)
                    continue
                with self._lock:
                    if shard_id in self._held:
                        self._held[shard_id] = renewed

    def _release_lease(self, lease: Lease) -> None:
        try:
            self.leases.release(lease)
        except StorageError as error:
            log.warning("lease not released, it will expire: %s", error)
