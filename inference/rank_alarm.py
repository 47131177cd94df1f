"""RankAlarm: out of memory on one host is told to the ranks of all, which then end together to start anew.

A replica's process hears the ranks of its own host only, and to those a rank that ends elsewhere is a lost peer. So a
rank that is out of memory says so in the store at which all have met, before it ends:

    rank 5   settle(failure) -> the key -> every rank's thread -> counted -> told to its host's process -> exit code 6

None ends before all have seen it, or a moment has passed: the store goes with the first host's ranks.
"""

import contextlib
import json
import os
import threading
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from inference.rank_exit import ExitCode
from inference.rank_link import RankLink
from inference.rank_messages import Message
from inference.world import Place

_ALARM = "nightjar/out_of_memory"
_NUM_SEEN = "nightjar/out_of_memory/num_seen"
_ALL_HAVE_SEEN = "nightjar/out_of_memory/all_have_seen"

_FOREVER = timedelta(days=365)
_TELL = timedelta(seconds=5)
_SETTLE_S = 15.0


class RankAlarm:
    """One rank's. Nothing is listened to before `listen`: on one host the replica's process hears every rank."""

    def __init__(self, place: Place, link: RankLink | None) -> None:
        self._place = place
        self._link = link
        self._thread: threading.Thread | None = None
        self._has_seen = threading.Event()

    def listen(self) -> None:
        """End this process, by a thread, once any rank is out of memory; the ranks have met."""
        # A connection of its own: one that waits can do nothing else.
        store = _connect(_FOREVER)
        self._thread = threading.Thread(
            target=self._wait, args=(store,), name="nightjar-rank-alarm", daemon=True
        )
        self._thread.start()

    def settle(self, failure: Message) -> None:
        """Tell all ranks if this one is out of memory; does not return if the ranks end together on that.

        Args:
            failure: how this rank ends, which may be a consequence of how others do.
        """
        if self._thread is None:
            return
        if failure["code"] == ExitCode.OUT_OF_MEMORY:
            try:
                told = {**failure, "rank": self._place.rank}
                _connect(_TELL).set(_ALARM, json.dumps(told))
            except dist.DistError:  # the first host is gone: it is told as any other ending
                return
        elif not self._has_seen.is_set():
            return
        self._thread.join(_SETTLE_S)

    def _wait(self, store: Any) -> None:
        try:
            told = json.loads(store.get(_ALARM))
        except dist.DistError:  # the first host is gone: the main thread meets it too
            return
        self._has_seen.set()
        with contextlib.suppress(dist.DistError):
            if store.add(_NUM_SEEN, 1) == self._place.size:
                store.set(_ALL_HAVE_SEEN, "")
            store.wait([_ALL_HAVE_SEEN], _TELL)
        rank = told.pop("rank")
        if rank != self._place.rank:
            told["error"] = f"rank {rank}: {told['error']}"
        if self._link is not None:
            self._link.send(told)
            self._link.flush()
        os._exit(ExitCode.OUT_OF_MEMORY)  # not sys.exit: the main thread waits for a peer


def _connect(timeout: timedelta) -> Any:
    """Return a connection to the store at which the ranks have met, a TCPStore. Raises dist.DistError."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, None, False, timeout, wait_for_workers=False)  # type: ignore[attr-defined]
