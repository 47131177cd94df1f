"""Fetch many small files some way ahead of whoever needs them in order: requests take time, not bandwidth."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar

NUM_THREADS = 8
SMALL_BYTES = 16 << 20


class _Sized(Protocol):
    @property
    def size(self) -> int:
        """Bytes."""


_File = TypeVar("_File", bound=_Sized)
_Result = TypeVar("_Result")


def ahead(
    files: Iterable[_File], fetch: Callable[[_File], _Result]
) -> Iterator[tuple[_File, Callable[[], _Result]]]:
    """Yield every file, in order, with a call that returns what `fetch` does for it, or raises so.

    Small files are fetched by threads, a few at a time; a large one only when it is asked for, since a
    fetch that has begun is waited for by whoever stops early.
    """
    waiting: deque[tuple[_File, Callable[[], _Result]]] = deque()
    pool = ThreadPoolExecutor(NUM_THREADS, "nightjar-ahead")
    try:
        for file in files:
            is_small = file.size <= SMALL_BYTES
            waiting.append(
                (file, pool.submit(fetch, file).result if is_small else partial(fetch, file))
            )
            if len(waiting) > NUM_THREADS:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
