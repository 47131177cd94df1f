"""Ask a store, before any work, whether it keeps the promises the commit protocol rests on.

Some stores ignore a condition without a word instead of refusing it, so asking is the only way. About
twenty small requests and three of 8 MiB, under `_probe/`, which is empty again afterwards. The
result belongs in the run's report; asking once per endpoint and run is enough.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from storage import keys
from storage.errors import AlreadyExists, PreconditionFailed, StorageError, StoreUnfit
from storage.local_store import LocalStore
from storage.object_store import ObjectStore

_NUM_RACERS = 3
_RACE_BYTES = 8 << 20
_NO_SUCH_ETAG = "0" * 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a store was found to do."""

    uri: str
    kind: str
    """Class name of the store."""

    creates_once: bool
    """A second create of the same key is refused: the commit rests on it."""

    races_have_one_winner: bool
    """Of several creates at the same time exactly one succeeds: the commit rests on it."""

    swaps: bool
    """A replacing write is refused when the ETag is another: leases rest on it."""

    pins_ranges: bool
    """A ranged read is refused when the ETag is another: pinned inputs rest on it."""

    has_links: bool | None = None
    """Local folders: hard links work."""

    verifies_checksums: bool | None = None
    """S3: a body that is not what its checksum says is refused."""

    keeps_full_checksum: bool | None = None
    """S3: the CRC64NVME of a whole object is told, so downloads can be checked."""

    lists_in_byte_order: bool | None = None
    """S3: as it comes; listings are sorted here anyway."""

    quotes_etags: bool | None = None
    """S3: If-Match wants the ETag in quotes."""

    clock_skew_s: float = 0.0
    """The store's clock minus ours, to about a second."""

    @property
    def is_fit(self) -> bool:
        """Whether several replicas may work here."""
        return self.creates_once and self.races_have_one_winner and self.has_links is not False

    @property
    def faults(self) -> list[str]:
        """What is amiss, in words; empty for a store that does everything."""
        found = {
            "a create-only write replaced an object": self.creates_once,
            "several create-only writes at once succeeded": self.races_have_one_winner,
            "there are no hard links": self.has_links is not False,
            "If-Match on a write is ignored": self.swaps,
            "If-Match on a ranged read is ignored": self.pins_ranges,
        }
        return [fault for fault, is_fine in found.items() if not is_fine]


def probe_store(store: ObjectStore, *, allow_single_writer: bool = False) -> Capabilities:
    """Try the store out and tell what it does.

    Args:
        allow_single_writer: Accept a store without working conditional writes; the caller promises
            that one replica only works on the run.

    Raises:
        StoreUnfit: the store would let two attempts commit the same shard.
        StorageError: the store cannot be written at all; typed.
    """
    folder = f"{keys.PROBE}{os.urandom(6).hex()}/"
    try:
        found = _probe(store, folder)
    finally:
        _clean(store, folder)
    if not found.is_fit and not allow_single_writer:
        raise StoreUnfit(
            f"{store.uri}: {'; '.join(found.faults)}; exactly-once cannot be kept by several replicas. "
            "Use another store, or storage.allow_single_writer: true with one replica"
        )
    return found


def _probe(store: ObjectStore, folder: str) -> Capabilities:
    key = f"{folder}object"
    before = time.time()
    first = store.put_if_absent(key, b"first")
    skew_s = first.modified_at - (before + time.time()) / 2
    found: dict[str, bool] = {
        "creates_once": _refuses(AlreadyExists, lambda: store.put_if_absent(key, b"second")),
        "races_have_one_winner": _race(store, f"{folder}race") == 1,
        "swaps": _swaps(store, key),
        "pins_ranges": _refuses(
            PreconditionFailed, lambda: store.get_range(key, 0, 1, if_match=_NO_SUCH_ETAG)
        ),
    }
    if isinstance(store, LocalStore):
        found["has_links"] = store.can_link()
    elif store.uri.startswith("s3://"):
        found |= _probe_s3(store, folder, key)
    return Capabilities(
        uri=store.uri,
        kind=type(store).__name__,
        clock_skew_s=round(skew_s, 1),
        **found,
    )


def _probe_s3(store: ObjectStore, folder: str, key: str) -> dict[str, bool]:
    from storage.s3_store import S3Store  # boto3 takes a while to import

    if not isinstance(store, S3Store):
        return {}
    for name in ("a-b", "a/b", "a0"):
        store.put(f"{folder}order/{name}", b"")
    return {
        "quotes_etags": store.quotes_etags,
        "verifies_checksums": store.verifies_checksums(f"{folder}damaged"),
        "keeps_full_checksum": store.keeps_full_checksum(key),
        "lists_in_byte_order": store.lists_in_byte_order(f"{folder}order/"),
    }


def _swaps(store: ObjectStore, key: str) -> bool:
    etag = store.head(key).etag
    if not _refuses(PreconditionFailed, lambda: store.put_if_match(key, b"swap", _NO_SUCH_ETAG)):
        return False
    store.put_if_match(key, b"swapped", etag)
    return store.get(key) == b"swapped"


def _race(store: ObjectStore, key: str) -> int:
    """Let several threads create one key at the same time; return how many think they did."""
    size = _RACE_BYTES if store.uri.startswith("s3://") else 1 << 10
    start = threading.Barrier(_NUM_RACERS)
    won: list[int] = []
    faults: list[StorageError] = []

    def create(racer: int) -> None:
        data = bytes([racer]) * size
        start.wait()
        try:
            store.put_if_absent(key, data)
            won.append(racer)
        except AlreadyExists:
            return
        except StorageError as error:
            faults.append(error)

    threads = [threading.Thread(target=create, args=(racer,)) for racer in range(_NUM_RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return len(won)


def _refuses(error: type[StorageError], request: Callable[[], object]) -> bool:
    try:
        request()
    except error:
        return True
    return False


def _clean(store: ObjectStore, folder: str) -> None:
    # What cannot be removed does no harm; the fault that matters was raised already.
    with suppress(StorageError):
        for info in list(store.list(folder)):
            store.delete(info.key)
