"""Copy files by ranges: many threads, several files at once, each range checksummed where it passes.

A body that breaks off is taken up where it ended; a store that stays away is given up after bounded
tries. What was copied until then stays, and is checked again by the next copy (see
`storage.partial_file`).
"""

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from storage.checksums import Checksum
from storage.disk_space import NO_SPACE, no_space
from storage.errors import StoreUnavailable
from storage.huge_pages import HugePages
from storage.partial_file import PartialFile
from storage.s3_client import RetryPolicy
from storage.stage_sources import RangeBody, RangedSource, SourceFile

BUFFER_BYTES = 2 << 20

Task = TypeVar("Task")


@dataclass(slots=True)
class CopyStats:
    """What a copy did. Seconds are summed over threads."""

    bytes_moved: int = 0
    bytes_resumed: int = 0
    huge_bytes: int = 0
    num_ranges: int = 0
    num_retries: int = 0
    read_s: float = 0.0
    checksum_s: float = 0.0
    write_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **amounts: float) -> None:
        """Add to several counts at once; may be called by threads."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)


@dataclass(slots=True)
class _Progress:
    """How far one range is on disk, and the checksum up to there."""

    position: int
    checksum: int = 0
    moved_at: float = field(default_factory=time.monotonic)


class RangedCopy:
    """Copies files of one source into one folder with a fixed number of threads."""

    def __init__(
        self,
        source: RangedSource,
        folder: Path,
        *,
        direct: bool,
        num_threads: int = 8,
        retry: RetryPolicy | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """`direct`: bypass the page cache where the file system can; `on_bytes` is told of every write."""
        self._source = source
        self._folder = folder
        self._is_direct = direct
        self._num_threads = num_threads
        self._retry = retry or RetryPolicy()
        self._on_bytes = on_bytes or (lambda num_bytes: None)
        self._files: list[PartialFile] = []
        self._num_bytes = 0
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.stats = CopyStats()
        self.checksums: dict[str, Checksum] = {}

    def resume(self, files: list[SourceFile]) -> None:
        """Take on these files, and keep of an earlier copy what still has its checksum."""
        self._num_bytes = sum(file.size for file in files)
        for file in files:
            self._files.append(PartialFile(self._folder, file, direct=self._is_direct))
        self._in_threads(self._resume, iter(list(self._files)))

    def allocate(self) -> None:
        """Reserve room for every file taken on. Raises NoSpace."""
        try:
            huge = HugePages()
            self._in_threads(
                lambda copied: self.stats.add(huge_bytes=copied.allocate(huge)),
                iter(list(self._files)),
            )
        except BaseException:
            self._give_up_room()
            raise

    def run(self, on_file: Callable[[Path], None] | None = None) -> None:
        """Copy every range that is missing; `on_file` is told of each file as it becomes whole.

        Raises:
            StorageError: the first fault of any range; whole files and journals stay for the next try.
        """
        on_file = on_file or (lambda path: None)
        try:
            for copied in self._files:
                if not copied.missing():
                    self._publish(copied, on_file)
            tasks = ((copied, index) for copied in self._files for index in copied.missing())
            self._in_threads(lambda task: self._copy(*task, on_file), tasks)
        finally:
            self.close()
        sync_folder(self._folder)

    def close(self) -> None:
        """Let go of every file."""
        for copied in self._files:
            copied.close()
        self._files = []

    def _resume(self, copied: PartialFile) -> None:
        kept = copied.resume()
        self.stats.add(bytes_resumed=kept)
        self._on_bytes(kept)

    def _copy(self, copied: PartialFile, index: int, on_file: Callable[[Path], None]) -> None:
        if copied.record(index, self._copy_range(copied, index)):
            self._publish(copied, on_file)

    def _publish(self, copied: PartialFile, on_file: Callable[[Path], None]) -> None:
        self.checksums[copied.file.name] = copied.publish()
        on_file(copied.path)

    def _copy_range(self, copied: PartialFile, index: int) -> int:
        """Move one range, taking it up again where a body broke off; return its checksum."""
        position, end = copied.span(index)
        progress = _Progress(position)
        failures = 0
        while progress.position < end and not self._stop.is_set():
            try:
                self._stream(copied, progress, end)
            except StoreUnavailable as error:
                failures += 1
                waited_s = time.monotonic() - progress.moved_at
                if failures >= self._retry.max_attempts or waited_s >= self._retry.patience_s:
                    raise StoreUnavailable(
                        f"{error}; gave up after {failures} attempts, {waited_s:.0f} s without progress"
                    ) from error
                self.stats.add(num_retries=1)
                self._stop.wait(self._retry.delay_s(failures - 1))
        if self._stop.is_set():
            raise InterruptedError
        self.stats.add(num_ranges=1)
        return progress.checksum

    def _stream(self, copied: PartialFile, progress: "_Progress", end: int) -> None:
        """Move bytes up to `end` through this thread's buffer."""
        buffer = _thread_buffer()
        body = self._source.open_range(copied.file, progress.position, end)
        try:
            while progress.position < end and not self._stop.is_set():
                began = time.perf_counter()
                count = min(BUFFER_BYTES, end - progress.position)
                fill(body, buffer[:count], copied.file.name)
                read = time.perf_counter()
                checksum = copied.algorithm.update(buffer[:count], progress.checksum)
                summed = time.perf_counter()
                copied.write(buffer, count, progress.position)
                wrote = time.perf_counter()
                progress.position += count
                progress.checksum = checksum
                progress.moved_at = wrote
                self.stats.add(
                    bytes_moved=count,
                    read_s=read - began,
                    checksum_s=summed - read,
                    write_s=wrote - summed,
                )
                self._on_bytes(count)
        finally:
            body.close()

    def _in_threads(self, work: Callable[[Task], None], tasks: Iterator[Task]) -> None:
        """Do every task; the first error stops all threads and is raised here."""
        lock = threading.Lock()

        def loop() -> None:
            try:
                while not self._stop.is_set():
                    with lock:
                        task = next(tasks, None)
                    if task is None:
                        return
                    work(task)
            except BaseException as error:  # handed to the caller's thread below
                with lock:
                    self._error = self._error or error
                self._stop.set()

        threads = [threading.Thread(target=loop, daemon=True) for _ in range(self._num_threads)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # a signal: no thread may write after we have let go of the files
            self._stop.set()
            for thread in threads:
                thread.join()
            raise
        if self._error:
            raise self._explained(self._error)

    def _give_up_room(self) -> None:
        for copied in self._files:
            if len(copied.missing()) == copied.num_ranges:
                copied.discard()
        self.close()

    def _explained(self, error: BaseException) -> BaseException:
        """A full disk in our words; any other fault as it is."""
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return no_space(self._folder, self._num_bytes)
        return error


_buffers = threading.local()


def _thread_buffer() -> memoryview:
    """This thread's own page-aligned buffer, which O_DIRECT demands."""
    if not hasattr(_buffers, "view"):
        _buffers.view = memoryview(mmap.mmap(-1, BUFFER_BYTES))
    view: memoryview = _buffers.view
    return view


def fill(body: RangeBody, view: memoryview, name: str) -> None:
    """Read as many bytes as the view holds. Raises StoreUnavailable when fewer come."""
    filled = 0
    while filled < len(view):
        count = body.readinto(view[filled:])
        if not count:
            raise StoreUnavailable(f"{name}: the body ended {len(view) - filled} bytes early")
        filled += count


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
