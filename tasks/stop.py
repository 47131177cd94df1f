"""Ending early: one signal asks, whoever works looks; nothing is cut off between two durable steps."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol


class Stopped(Exception):
    """The work was asked to stop; leases are released and every shard is resumable."""


class Stoppable(Protocol):
    """Whatever can say that it is time to stop."""

    def is_set(self) -> bool:
        """Whether to stop now."""


class Broken(Exception):
    """A run that had begun could not go on; what is committed stays. The cause says why."""

    retryable: ClassVar[bool] = True


class StopSignal(threading.Event):
    """Asks for an orderly end. While it is `watched`, the work looks at it by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.is_watched = False
        """Else nobody looks: whoever sets it may raise `Stopped` in the main thread at once."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Promise to look while the body runs.

        Raises:
            Stopped: it was set before.
        """
        self.is_watched = True
        try:
            if self.is_set():
                raise Stopped
            yield
        finally:
            self.is_watched = False
