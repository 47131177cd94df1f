"""SIGTERM while a flow runs: stop at a safe point, then let Prefect have its way.

Prefect raises its signal exception wherever the process happens to be, between taking a lease and
noting it, say. Here the signal first asks; what does not end within the grace is ended as Prefect does.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from prefect.exceptions import TerminationSignal

from tasks.stop import StopSignal

_GRACE_S = 10.0  # a cancelled flow run is killed after 30


class StopRequest(StopSignal):
    """Set by SIGTERM, or when the signal it stands in for is set."""

    def __init__(self, outer: StopSignal | None = None) -> None:
        """Stop when `outer` is set, too."""
        super().__init__()
        self._outer = outer or StopSignal()

    @property
    def is_terminated(self) -> bool:
        """Whether SIGTERM came."""
        return super().is_set()

    def is_set(self) -> bool:
        """Whether to stop now."""
        return self.is_terminated or self._outer.is_set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Promise to look while the body runs; raises as `StopSignal.watched` does."""
        with self._outer.watched(), super().watched():
            yield


@contextmanager
def stop_on_sigterm(outer: StopSignal | None = None) -> Iterator[StopRequest]:
    """Yield what SIGTERM sets.

    Raises:
        TerminationSignal: at the end if SIGTERM came; at once while nobody watches, and when it
            came ten seconds ago.
    """
    request = StopRequest(outer)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    timer = threading.Timer(_GRACE_S, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        if request.is_terminated or not request.is_watched:
            raise TerminationSignal(signum)
        request.set()
        timer.start()

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield request
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    if request.is_terminated:
        raise TerminationSignal(signal.SIGTERM)
