"""Finished rows on their way to completions: decoded on a thread of its own, while the engine's loop goes on.

A long completion takes 0.1 to 0.3 ms to decode, and rows of one length all end in the same step.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from inference.backends.row import Row
from inference.sequence import Completion


class Finishing:
    """A queue of finished rows; completions leave it in the order the rows came."""

    def __init__(self, *, is_async: bool) -> None:
        """`is_async`: decode behind the loop; else at once."""
        self._pool = ThreadPoolExecutor(1, "detokenise") if is_async else None
        self._waiting: deque[tuple[int, Future[Completion]]] = deque()

    def __len__(self) -> int:
        """Rows that have come and whose completions have not been taken."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[int]:
        """Their sequences' numbers."""
        return (seq_id for seq_id, _ in self._waiting)

    def put(self, row: Row, num_cached_tokens: int) -> None:
        """Take a row whose `finish_reason` is set, and which nothing changes any more."""
        if self._pool is not None:
            future = self._pool.submit(row.completion, num_cached_tokens)
        else:
            future = Future()
            future.set_result(row.completion(num_cached_tokens))
        self._waiting.append((row.sequence.seq_id, future))

    def take(self, *, wait: bool) -> list[Completion]:
        """Return the completions in front that are ready; `wait` for every one there is."""
        finished: list[Completion] = []
        while self._waiting and (wait or self._waiting[0][1].done()):
            finished.append(self._waiting.popleft()[1].result())
        return finished
