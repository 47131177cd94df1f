"""SIGINT and SIGTERM at the command line: the first asks for an orderly end, a second one ends the process."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flows import console
from tasks.stop import Stopped, StopSignal

_ORPHAN_GRACE_S = 60.0


class Stop(StopSignal):
    """Set by the first SIGINT or SIGTERM; remembers which. A second one ends the process at once."""

    signum: int = signal.SIGINT

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler.

        Raises:
            Stopped: nobody watches, as while planning: the step in hand is given up.
        """
        if self.is_set():
            console.show_cursor()
            os._exit(128 + signum)
        self.signum = signum
        self.set()
        if not self.is_watched:
            raise Stopped

    def follow_parent(self) -> None:
        """Stop when standard input closes, as it does when the process that started this one ends."""
        threading.Thread(target=self._follow, name="nightjar-parent", daemon=True).start()

    def _follow(self) -> None:
        while os.read(sys.stdin.fileno(), 4096):
            continue
        self.signum = signal.SIGTERM
        self.set()
        time.sleep(_ORPHAN_GRACE_S)
        os._exit(128 + signal.SIGTERM)


stop = Stop()
"""Of this process."""


@contextmanager
def signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM ask `stop` while the body runs; warnings go to stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    old = {s: signal.signal(s, stop.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
