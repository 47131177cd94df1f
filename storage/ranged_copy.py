"""Copy files by ranges: in parallel, verified, resumable, and whole or not at all.

    listed --allocate--> name.partial + name.journal --every range--> verified --fsync, rename--> name

A range is read into a buffer, checksummed there, written, and noted in the journal. A later copy
believes no journal: it checksums what is on disk again and fetches what differs. A file whose
combined checksum is not the promised one is deleted and refused. Journals stay until the whole model
is published, so that a copy that died between two files can check those it had finished.
"""

import errno
import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from storage import weight_files
from storage.checksums import (
    CRC64NVME,
    RANGE_ALGORITHMS,
    SHA256,
    Checksum,
    RangeAlgorithm,
    file_checksum,
)
from storage.errors import CorruptObject, NoSpace, StoreUnavailable
from storage.s3_client import RetryPolicy
from storage.stage_sources import RangeBody, RangedSource, SourceFile

RANGE_BYTES = 16 << 20
BUFFER_BYTES = 4 << 20
_ALIGNMENT = 4096  # of O_DIRECT offsets and lengths

Task = TypeVar("Task")

PARTIAL_SUFFIX = ".partial"
JOURNAL_SUFFIX = ".journal"


@dataclass(slots=True)
class CopyStats:
    """What a copy did. Seconds are summed over threads."""

    bytes_moved: int = 0
    bytes_resumed: int = 0
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


class CopiedFile:
    """One file being copied: its partial, its journal and the ranges still missing."""

    def __init__(self, folder: Path, file: SourceFile, *, direct: bool) -> None:
        self.file = file
        self.path = folder / file.name
        self._partial = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        self._journal_path = self.path.with_name(self.path.name + JOURNAL_SUFFIX)
        promised = file.checksum.algorithm if file.checksum else ""
        self.algorithm: RangeAlgorithm = RANGE_ALGORITHMS.get(promised, CRC64NVME)
        self._header = json.dumps([file.size, file.etag, RANGE_BYTES, self.algorithm.name])
        self._checksums: dict[int, int] = {}
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.path.exists():  # whole, but its model never was: check it again
            self.path.rename(self._partial)
        self._fd, self._direct = _open_for_writing(self._partial, direct)
        self._journal = self._journal_path.open("a+", encoding="utf-8")

    @property
    def num_ranges(self) -> int:
        return -(-self.file.size // RANGE_BYTES)

    def span(self, index: int) -> tuple[int, int]:
        """First and last-plus-one byte of a range."""
        start = index * RANGE_BYTES
        return start, min(start + RANGE_BYTES, self.file.size)

    def missing(self) -> list[int]:
        """Ranges that are not on disk yet."""
        return [index for index in range(self.num_ranges) if index not in self._checksums]

    def resume(self) -> int:
        """Keep the journaled ranges whose bytes on disk still have the noted checksum; return their bytes."""
        kept = 0
        with self._partial.open("rb") as partial:
            for index, noted in self._noted().items():
                start, end = self.span(index)
                partial.seek(start)
                if self.algorithm.update(partial.read(end - start), 0) == noted:
                    self._checksums[index] = noted
                    kept += end - start
        self._journal.seek(0)
        self._journal.truncate()
        lines = [self._header, *(f"{index} {crc}" for index, crc in self._checksums.items())]
        self._journal.write("\n".join(lines) + "\n")
        self._journal.flush()
        return kept

    def allocate(self) -> None:
        """Reserve the file's blocks, so that a full disk shows now. Raises OSError."""
        if self.file.size:
            os.posix_fallocate(
                self._fd, 0, _aligned(self.file.size) if self._direct else self.file.size
            )

    def write(self, buffer: memoryview, count: int, offset: int) -> None:
        """Write the first `count` bytes of `buffer`; beyond them O_DIRECT may write padding."""
        end = _aligned(count) if self._direct else count
        done = 0
        while done < end:
            done += os.pwrite(self._fd, buffer[done:end], offset + done)

    def record(self, index: int, checksum: int) -> bool:
        """Note a range as written; True when it was the last one missing."""
        with self._lock:
            self._checksums[index] = checksum
            self._journal.write(f"{index} {checksum}\n")
            self._journal.flush()
            return len(self._checksums) == self.num_ranges

    def publish(self) -> Checksum:
        """Verify the whole file, make it durable and give it its name; return its checksum.

        Raises:
            CorruptObject: not the promised checksum, or not a sound safetensors file; it is deleted.
        """
        parts = []
        for index in range(self.num_ranges):
            start, end = self.span(index)
            parts.append((self._checksums[index], end - start))
        found = self.algorithm.whole(parts)
        os.ftruncate(self._fd, self.file.size)
        try:
            self._refuse_damage(found)
        except CorruptObject:
            self.discard()
            raise
        os.fsync(self._fd)
        os.rename(self._partial, self.path)
        self.close()
        return found

    def discard(self) -> None:
        """Delete what was copied so far."""
        self.close()
        self._partial.unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files; what is on disk can be resumed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._journal.close()
            self._fd = -1

    def _refuse_damage(self, found: Checksum) -> None:
        want = self.file.checksum
        if want and want.algorithm == found.algorithm and want != found:
            raise CorruptObject(
                f"{self.file.name}: {self.file.promised_by} promises {want}, the copy has {found}; "
                "it was deleted; stage again, and check the source if it differs once more"
            )
        if want and want.algorithm == SHA256 and file_checksum(self._partial, SHA256) != want:
            raise CorruptObject(
                f"{self.file.name}: its SHA-256 is not the one in {self.file.promised_by}; "
                "the copy was deleted; stage again, and check the source if it differs once more"
            )
        if weight_files.is_weights(self.file.name):
            weight_files.check_safetensors(self._partial, name=self.file.name)

    def _noted(self) -> dict[int, int]:
        self._journal.seek(0)
        header, *lines = self._journal.read().split("\n")
        if header != self._header:
            return {}
        noted = {}
        for line in lines[:-1]:  # the last one is empty, or was cut off in the middle
            index, _, crc = line.partition(" ")
            if index.isdigit() and crc.isdigit() and int(index) < self.num_ranges:
                noted[int(index)] = int(crc)
        return noted


@dataclass(slots=True)
class _Progress:
    """How far one range is on disk, and the checksum up to there."""

    position: int
    checksum: int = 0


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
        self._files: list[CopiedFile] = []
        self._num_bytes = 0
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.stats = CopyStats()
        self.checksums: dict[str, Checksum] = {}

    def resume(self, files: list[SourceFile]) -> None:
        """Take on these files, and keep of an earlier copy what still has its checksum."""
        self._num_bytes = sum(file.size for file in files)
        for file in files:
            self._files.append(CopiedFile(self._folder, file, direct=self._is_direct))
        self._in_threads(self._resume, iter(list(self._files)))

    def allocate(self) -> None:
        """Reserve room for every file taken on. Raises NoSpace."""
        try:
            for copied in self._files:
                copied.allocate()
        except OSError as error:
            self._give_up_room()
            raise self._explained(error) from None

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

    def _resume(self, copied: CopiedFile) -> None:
        kept = copied.resume()
        self.stats.add(bytes_resumed=kept)
        self._on_bytes(kept)

    def _copy(self, copied: CopiedFile, index: int, on_file: Callable[[Path], None]) -> None:
        if copied.record(index, self._copy_range(copied, index)):
            self._publish(copied, on_file)

    def _publish(self, copied: CopiedFile, on_file: Callable[[Path], None]) -> None:
        self.checksums[copied.file.name] = copied.publish()
        on_file(copied.path)

    def _copy_range(self, copied: CopiedFile, index: int) -> int:
        """Move one range, taking it up again where a body broke off; return its checksum."""
        position, end = copied.span(index)
        progress = _Progress(position)
        failures = 0
        while progress.position < end and not self._stop.is_set():
            try:
                self._stream(copied, progress, end)
            except StoreUnavailable as error:
                failures += 1
                if failures >= self._retry.max_attempts:
                    raise StoreUnavailable(f"{error}; gave up after {failures} attempts") from error
                self.stats.add(num_retries=1)
                self._stop.wait(self._retry.delay_s(failures - 1))
        if self._stop.is_set():
            raise InterruptedError
        self.stats.add(num_ranges=1)
        return progress.checksum

    def _stream(self, copied: CopiedFile, progress: "_Progress", end: int) -> None:
        """Move bytes up to `end` through this thread's buffer."""
        buffer = _thread_buffer()
        body = self._source.open_range(copied.file, progress.position, end)
        try:
            while progress.position < end and not self._stop.is_set():
                began = time.perf_counter()
                count = min(BUFFER_BYTES, end - progress.position)
                _fill(body, buffer[:count], copied.file.name)
                read = time.perf_counter()
                checksum = copied.algorithm.update(buffer[:count], progress.checksum)
                summed = time.perf_counter()
                copied.write(buffer, count, progress.position)
                wrote = time.perf_counter()
                progress.position += count
                progress.checksum = checksum
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
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        room = os.statvfs(self._folder)
        return NoSpace(
            f"{self._folder}: {self._num_bytes} bytes needed, {room.f_bavail * room.f_frsize} free; "
            "make room or stage to another folder"
        )


_buffers = threading.local()


def _thread_buffer() -> memoryview:
    """This thread's own page-aligned buffer, which O_DIRECT demands."""
    if not hasattr(_buffers, "view"):
        _buffers.view = memoryview(mmap.mmap(-1, BUFFER_BYTES))
    view: memoryview = _buffers.view
    return view


def _fill(body: RangeBody, view: memoryview, name: str) -> None:
    filled = 0
    while filled < len(view):
        count = body.readinto(view[filled:])
        if not count:
            raise StoreUnavailable(f"{name}: the body ended {len(view) - filled} bytes early")
        filled += count


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _open_for_writing(path: Path, direct: bool) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: this file system has no O_DIRECT
                raise
    return os.open(path, flags, 0o600), False


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
