"""The `_cancel` marker: stops every replica of a start, wherever it runs, without Prefect's help.

    {"cancelled": ["ab12..."], "except": []}     that start is cancelled
    {"cancelled": ["*"], "except": ["cd34..."]}  every start but the named ones; also an empty `_cancel`

A start (`nightjar run`, a flow run) never clears the marker: it exempts itself, so that replicas of the
start that was cancelled still stop, however late they look.
"""

import json
import logging
import threading
from typing import NamedTuple

from storage import keys
from storage.errors import AlreadyExists, NotFound, PreconditionFailed, StorageError
from storage.manifest import to_json
from storage.object_store import ObjectStore
from tasks.stop import StopSignal

log = logging.getLogger("nightjar.cancel")

EVERYONE = "*"
_POLL_S = 10.0


class _Marker(NamedTuple):
    cancelled: frozenset[str]
    exempt: frozenset[str]

    def stops(self, invocation: str) -> bool:
        if invocation in self.cancelled:
            return True
        return EVERYONE in self.cancelled and invocation not in self.exempt

    def to_json(self) -> bytes:
        return to_json({"cancelled": sorted(self.cancelled), "except": sorted(self.exempt)})


def cancel(store: ObjectStore, invocation: str = EVERYONE) -> None:
    """Ask every replica of a start to stop; by default every replica there is now."""
    while True:
        found = _read(store)
        if found is None:
            marker = _Marker(frozenset({invocation}), frozenset())
        else:
            # Cancelling everyone takes back what earlier starts were granted.
            exempt = frozenset() if invocation == EVERYONE else found[0].exempt
            marker = _Marker(found[0].cancelled | {invocation}, exempt)
        if _write(store, marker, found):
            return


def exempt(store: ObjectStore, invocation: str) -> None:
    """Let a new start go on in spite of an earlier cancellation of everyone."""
    while True:
        found = _read(store)
        if found is None or not found[0].stops(invocation):
            return
        marker = _Marker(found[0].cancelled, found[0].exempt | {invocation})
        if _write(store, marker, found):
            return


def is_cancelled(store: ObjectStore, invocation: str) -> bool:
    """Whether this start was asked to stop."""
    found = _read(store)
    return found is not None and found[0].stops(invocation)


class CancelWatch(StopSignal):
    """Stops when the marker says so, looked for every ten seconds, or when another signal does."""

    def __init__(
        self,
        store: ObjectStore,
        invocation: str,
        outer: StopSignal,
        *,
        poll_s: float = _POLL_S,
    ) -> None:
        """Watch until `close`."""
        super().__init__()
        self._store, self._invocation, self._outer = store, invocation, outer
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, args=(poll_s,), name="nightjar-cancel", daemon=True
        )
        self._thread.start()

    @property
    def is_cancelled(self) -> bool:
        """Whether the marker was found."""
        return super().is_set()

    def is_set(self) -> bool:
        """Whether to stop now."""
        return self.is_cancelled or self._outer.is_set()

    def close(self) -> None:
        """Stop watching. Safe to repeat."""
        self._closed.set()
        self._thread.join()

    def _watch(self, poll_s: float) -> None:
        while not self._closed.wait(poll_s):
            try:
                if is_cancelled(self._store, self._invocation):
                    log.info("invocation=%s is cancelled", self._invocation)
                    self.set()
                    return
            except StorageError as error:
                log.warning("cannot look for a cancellation: %s", error)


def _read(store: ObjectStore) -> tuple[_Marker, str] | None:
    """Return the marker and its ETag; whatever is not ours, such as an empty file, means everyone."""
    try:
        etag = store.head(keys.CANCEL).etag
        value = json.loads(store.get(keys.CANCEL))
        marker = _Marker(frozenset(value["cancelled"]), frozenset(value["except"]))
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError):
        marker = _Marker(frozenset({EVERYONE}), frozenset())
    return marker, etag


def _write(store: ObjectStore, marker: _Marker, found: tuple[_Marker, str] | None) -> bool:
    try:
        if found is None:
            store.put_if_absent(keys.CANCEL, marker.to_json())
        else:
            store.put_if_match(keys.CANCEL, marker.to_json(), found[1])
    except (AlreadyExists, PreconditionFailed, NotFound):
        return False
    return True
