"""Watches a run from beside it: notes the moment it looks late or dear. Reads the store only."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from storage.commits import CommitCache
from storage.errors import StorageError
from storage.object_store import ObjectStore
from tasks.outlook import Outlook, read_outlook
from tasks.progress import Progress

log = logging.getLogger("nightjar.watch")

EVERY_S = 30.0


class Watch:
    """Compares one outlook after the other and speaks only when the verdict changes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._was_warned = False

    def see(self, found: Outlook | None) -> None:
        """Take the latest outlook; a warning that begins or ends is noted once."""
        if found is None:
            return
        self._progress.finish_p50 = found.finish_p50
        self._progress.finish_p90 = found.finish_p90
        self._progress.deadline = found.deadline
        if found.warning and not self._was_warned:
            self._progress.note(f"warning: {found.warning}")
        elif self._was_warned and not found.warning and found.seconds_p90 is not None:
            self._progress.note("back on time and within the budget")
        self._was_warned = bool(found.warning)


@contextmanager
def watching(store: ObjectStore, progress: Progress, *, every_s: float = EVERY_S) -> Iterator[None]:
    """Watch in a thread while the body runs."""
    done = threading.Event()
    thread = threading.Thread(
        target=_loop,
        args=(store, Watch(progress), done, every_s),
        name="nightjar-watch",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _loop(store: ObjectStore, watch: Watch, done: threading.Event, every_s: float) -> None:
    cache: CommitCache = {}
    while not done.wait(every_s):
        try:
            watch.see(read_outlook(store, cache=cache))
        except StorageError as error:
            log.info("no outlook now: %s", error)
