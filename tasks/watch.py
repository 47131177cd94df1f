"""Watches a run from beside it: notes the moment it looks late or dear. Reads the store only."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from storage import keys
from storage.commits import CommitCache, current_commits
from storage.errors import StorageError
from storage.manifest import CommitRecord, PlanManifest, digest
from storage.object_store import ObjectStore
from tasks.outlook import Outlook, read_outlook
from tasks.progress import Progress
from tasks.run_record import load_plan

log = logging.getLogger("nightjar.watch")

EVERY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A run under way at one moment, over all its replicas."""

    plan: PlanManifest
    commits: Mapping[int, CommitRecord]
    outlook: Outlook


OnLook = Callable[[Look], None]
"""Shows a look somewhere; it must not raise, and is called from another thread."""


def look_at(store: ObjectStore, cache: CommitCache | None = None) -> Look | None:
    """Read how a run is doing; None before it is planned. `cache` has commits known already."""
    plan = load_plan(store)
    if plan is None:
        return None
    commits = current_commits(store, digest(store.get(keys.PLAN)), cache=cache)
    outlook = read_outlook(store, commits=commits)
    return None if outlook is None else Look(plan=plan, commits=commits, outlook=outlook)


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
def watching(
    store: ObjectStore,
    progress: Progress,
    *,
    cache: CommitCache,
    every_s: float = EVERY_S,
    on_look: OnLook | None = None,
) -> Iterator[None]:
    """Watch in a thread while the body runs; `on_look` is shown each look, the first one at once.

    Commits that are read are added to `cache`, so that nobody in this process reads them again.
    """
    done = threading.Event()
    thread = threading.Thread(
        target=_loop,
        args=(store, Watch(progress), done, cache, every_s, on_look),
        name="nightjar-watch",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _loop(
    store: ObjectStore,
    watch: Watch,
    done: threading.Event,
    cache: CommitCache,
    every_s: float,
    on_look: OnLook | None,
) -> None:
    pause_s = 0.0 if on_look is not None else every_s
    while not done.wait(pause_s):
        started = time.thread_time()
        try:
            found = look_at(store, cache)
        except StorageError as error:
            log.info("no outlook now: %s", error)
            found = None
        if found is not None:
            watch.see(found.outlook)
            if on_look is not None:
                on_look(found)
        # A run of very many shards is looked at less often: never more than a hundredth of a core.
        pause_s = max(every_s, 100 * (time.thread_time() - started))
