"""A model folder that somebody is still filling: loading may begin with the files that are whole.

    filler:  begin(folder) -> add(path), add(path), ... -> finish(folder)      or fail(error) at any time
    loader:  folder() -> weight_files() -> wait_for_all()

The filler tells only of files whose bytes are verified and final, so the loader never reads others.
"""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from inference.errors import ModelError
from inference.weights import indexed_tensors


class Known(NamedTuple):
    """What is known at one moment of files on their way."""

    folder: Path | None
    """None until everything but the weights is there."""

    names: frozenset[str]
    """Files that are whole, as far as they were told of one by one."""

    is_whole: bool
    """Whether all files are."""


class Arriving:
    """Which files of a folder are whole. Every method may be called by any thread."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._names: set[str] = set()
        self._is_done = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self.waited_s = 0.0
        """Seconds that loaders have waited for files."""

    @classmethod
    def whole(cls, folder: Path) -> "Arriving":
        """A folder that nobody fills any more."""
        arriving = cls()
        arriving.finish(folder)
        return arriving

    def begin(self, folder: Path) -> None:
        """Everything but the weights is there and checked; they will come into this folder.

        Raises:
            ModelError: they were to come into another one.
        """
        with self._changed:
            if self._folder not in (None, folder):
                raise ModelError(f"{self._folder}: the model moved to {folder} while it was loaded")
            self._folder = folder
            self._changed.notify_all()

    def add(self, path: Path) -> None:
        """This file is whole."""
        with self._changed:
            self._names.add(path.name)
            self._changed.notify_all()

    def finish(self, folder: Path) -> None:
        """All files are whole, in this folder. Raises ModelError as `begin` does."""
        with self._changed:
            self.begin(folder)
            self._is_done = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """No more will come, for this reason."""
        with self._changed:
            self._is_done, self._error = True, error
            self._changed.notify_all()

    @property
    def has_begun(self) -> bool:
        """Whether everything but the weights is there."""
        return self._folder is not None

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self._is_done

    def known(self) -> Known:
        """Return what is known now, without waiting. Raises the filler's error."""
        with self._changed:
            if self._error is not None:
                raise self._error
            return Known(self._folder, frozenset(self._names), self._is_done)

    def folder(self) -> Path:
        """Wait until everything but the weights is there. Raises the filler's error."""
        with self._changed:
            self._wait_for(lambda: self._folder is not None)
            assert self._folder is not None, "finished before it began"
            return self._folder

    def wait_for_all(self) -> Path:
        """Wait until the folder is whole. Raises the filler's error."""
        with self._changed:
            self._wait_for(lambda: False)
        return self.folder()

    def weight_files(self, *, in_order: bool = False) -> Iterator[Path]:
        """Yield the weight files, each as soon as it is whole; `in_order`: of their names, as layers go on in them.

        Raises:
            ModelError: the index cannot be read; or the filler's error.
        """
        tensors = indexed_tensors(self.folder())
        left = set(tensors.values()) if tensors else {"model.safetensors"}
        while left:
            name = self._next({min(left)} if in_order else left)
            left.remove(name)
            yield self.folder() / name

    def _next(self, wanted: set[str]) -> str:
        """Wait for one of these files. Raises as `weight_files`."""
        with self._changed:
            self._wait_for(lambda: bool(wanted & self._names))
            return min(wanted & self._names or wanted)

    def _wait_for(self, is_there: Callable[[], bool]) -> None:
        """Wait for it, or for the end; the lock is held. Raises the filler's error."""
        began = time.monotonic()
        self._changed.wait_for(lambda: self._is_done or is_there())
        self.waited_s += time.monotonic() - began
        if self._error is not None:
            raise self._error
