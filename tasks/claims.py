"""Which shard next: leases held by this replica, tries counted per invocation.

    pending --next--> held --release--> committed | failed (tried again later, or exhausted)

Leases only save GPU time. Whether a shard is done is asked of its commit, never of its lease.
"""

import logging
import math
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from storage import keys
from storage.attempts import attempts_of, claim_attempt, record_failure
from storage.commits import Commits
from storage.errors import LeaseLost, NotFound, StorageError
from storage.lease import Lease, Leases
from storage.manifest import CommitRecord, Shard
from storage.object_store import ObjectStore
from tasks.cancel import is_cancelled

log = logging.getLogger("nightjar.claims")

_RENEW_EVERY_S = 20.0
_BACKOFF_S = 2.0


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

    _pending: dict[int, Shard] = field(init=False)
    _held: dict[int, Lease] = field(default_factory=dict)
    _attempts: dict[int, int] = field(default_factory=dict)
    _not_before: dict[int, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: threading.Event = field(default_factory=threading.Event)
    _renewer: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._pending = {shard.shard_id: shard for shard in self.shards}

    @property
    def num_pending(self) -> int:
        """Shards neither committed, held here, nor given up."""
        return len(self._pending)

    @property
    def seconds_to_retry(self) -> float | None:
        """Until a shard that failed here may be tried again; None when there is none to wait for."""
        now = time.monotonic()
        waits = [self._not_before[i] - now for i in self._pending if i in self._not_before]
        if not waits or now > self.claim_until:
            return None
        return max(0.0, min(waits))

    def next(self) -> Claim | None:
        """Claim the next free shard; None when none can be had now. Raises StorageError."""
        if time.monotonic() > self.claim_until:
            return None
        if is_cancelled(self.store, self.invocation):
            log.info("invocation=%s is cancelled; no further shard is claimed", self.invocation)
            return None
        for shard in list(self._pending.values()):
            claim = self._try(shard)
            if claim is not None:
                return claim
        return None

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
        record_failure(self.store, shard_id, attempt, error)
        tries = self._tries(shard_id)
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
            if self._exists(keys.commit(shard_id, revision)):
                del self._pending[shard_id]
            return None
        # Asked after the lease is ours: whoever committed did so before giving it back.
        if self._exists(keys.commit(shard_id, revision)) or self._is_exhausted(shard_id):
            del self._pending[shard_id]
            self._release_lease(lease)
            return None
        attempt = claim_attempt(
            self.store, shard_id, self.invocation, self.holder, revision=revision
        )
        with self._lock:
            self._held[shard_id] = lease
        self._attempts[shard_id] = attempt
        del self._pending[shard_id]
        self._keep_alive()
        return Claim(shard, attempt, revision, self.bases.get(shard_id))

    def _is_exhausted(self, shard_id: int) -> bool:
        if self._tries(shard_id) < self.max_attempts:
            return False
        self.exhausted.setdefault(shard_id, f"{self.max_attempts} attempts failed")
        return True

    def _tries(self, shard_id: int) -> int:
        """Count this invocation's attempts, those included that died without a word."""
        found = attempts_of(self.store, shard_id)
        return sum(attempt.invocation == self.invocation for attempt in found)

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
