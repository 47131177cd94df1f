"""Bodies that stop coming, or trickle, are cut off, so that they can be asked for again.

A socket's own timeout sees silence alone: a byte a second passes it for ever, within one call that
fills a buffer. So one thread watches how long every piece takes, and shuts the socket of a late one.
"""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

PIECE_BYTES = 2 << 20
"""What must come within `RetryPolicy.stall_s`, or all that is left."""

_LOOK_EVERY_S = 1.0


class Pace:
    """How one body comes: a `with` block around each piece. Used by one thread; closed once."""

    def __init__(self, stream: Any, stall_s: float) -> None:
        """`stream` is urllib3's response; one without a socket is never cut off."""
        self._stream = stream
        self._deadline = math.inf
        self.stall_s = stall_s
        self.is_cut = False
        _watch.begin(self)

    def __enter__(self) -> None:
        self._deadline = time.monotonic() + self.stall_s

    def __exit__(self, *exc: object) -> None:
        self._deadline = math.inf

    def close(self) -> None:
        """Watch it no longer."""
        _watch.end(self)

    def cut_if_late(self, now: float) -> None:
        """End the read that is under way, if it should have ended by now."""
        if now > self._deadline and hasattr(self._stream, "shutdown"):
            self.is_cut = True
            with suppress(OSError, RuntimeError, ValueError):  # it has just ended by itself
                self._stream.shutdown()


class _Watch:
    """One thread for all bodies of this process; there while there are any."""

    def __init__(self) -> None:
        self._paces: set[Pace] = set()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def begin(self, pace: Pace) -> None:
        with self._lock:
            self._paces.add(pace)
            if self._thread is None or not self._thread.is_alive():  # a fork has none
                self._thread = threading.Thread(target=self._run, name="stalls", daemon=True)
                self._thread.start()

    def end(self, pace: Pace) -> None:
        with self._lock:
            self._paces.discard(pace)

    def _run(self) -> None:
        while True:
            with self._lock:
                paces = list(self._paces)
                if not paces:
                    self._thread = None
                    return
            now = time.monotonic()
            for pace in paces:
                pace.cut_if_late(now)
            time.sleep(min(_LOOK_EVERY_S, *(pace.stall_s / 4 for pace in paces)))


_watch = _Watch()


@contextmanager
def paced(stream: Any, stall_s: float) -> Iterator[Pace]:
    """Watch a body for as long as the block lasts."""
    pace = Pace(stream, stall_s)
    try:
        yield pace
    finally:
        pace.close()


def read_whole(body: Any, stall_s: float) -> bytes:
    """Read a botocore body to its end; one that is cut off raises as one that the store cut short."""
    with paced(body._raw_stream, stall_s) as pace:
        pieces: list[bytes] = []
        while True:
            with pace:
                piece = body.read(PIECE_BYTES)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
