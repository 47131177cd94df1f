"""A folder on NVMe for one process: as large as a model, so whatever a killed process left behind is removed.

Its owner holds a lock that the kernel gives back with the process, wherever that ran on this machine.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_PREFIX = "nightjar-zero-"
_LOCK = "owner"


class SwapFolder:
    """The folder; closing removes it."""

    def __init__(self, parent: str) -> None:
        """Remove what dead owners left in `parent`, and make a folder of our own there."""
        for path in Path(parent).glob(f"{_PREFIX}*"):
            _remove_if_left(path)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._is_open = True

    def close(self) -> None:
        """Remove the folder. Safe to repeat."""
        if self._is_open:
            self._is_open = False
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)


def _remove_if_left(folder: Path) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # just being made, or another user's
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        logger.warning("%s was left behind by a process that was killed: removing it", folder)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
