"""Read many small objects, a few at a time: a store answers late, not little."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from storage.errors import NotFound
from storage.object_store import ObjectStore

_NUM_THREADS = 16
_FEW = 4


def get_many(store: ObjectStore, keys: Iterable[str]) -> Iterator[bytes | None]:
    """Yield every object's bytes in the order of its keys; None for one that is not there."""
    rest = iter(keys)
    first = list(islice(rest, _FEW + 1))
    if len(first) <= _FEW:
        yield from (_get(store, key) for key in first)
        return
    with ThreadPoolExecutor(_NUM_THREADS, "nightjar-many") as pool:
        while first:
            yield from pool.map(lambda key: _get(store, key), first)
            first = list(islice(rest, _NUM_THREADS * 4))


def _get(store: ObjectStore, key: str) -> bytes | None:
    try:
        return store.get(key)
    except NotFound:
        return None
