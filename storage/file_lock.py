"""Locks between processes, that a process lets go of however it ends."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path


class FileLock:
    """A held flock; closing it, or dying, releases it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Release; releasing twice is no fault."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, text: str) -> None:
        """Say something to those who wait; a full disk keeps it from being said."""
        with suppress(OSError):
            os.pwrite(self._fd, text.encode(), 0)
            os.ftruncate(self._fd, len(text.encode()))

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def take_lock(path: Path, operation: int) -> FileLock:
    """Take a flock on a file, which is created where there is none; `operation` as for `fcntl.flock`.

    Raises:
        BlockingIOError: another holds it, and `operation` has LOCK_NB.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, operation)
    except BaseException:
        os.close(fd)
        raise
    return FileLock(fd)
