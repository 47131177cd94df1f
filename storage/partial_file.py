"""One file on its way to a disk: written by ranges, journaled, verified, then given its name.

    name.partial + name.journal --every range recorded--> verified --fsync, rename--> name

The journal says which ranges were written and with what checksum. It is a hint for a later copy,
never proof: what is on disk is checksummed again. It stays until the whole model is published, so
that a copy that died between two files can check those it had finished.
"""

import errno
import json
import os
import threading
from pathlib import Path
from typing import BinaryIO

from storage import weight_files
from storage.checksums import (
    CRC64NVME,
    GIT_BLOB,
    RANGE_ALGORITHMS,
    SHA256,
    Checksum,
    RangeAlgorithm,
    file_checksum,
)
from storage.errors import CorruptObject
from storage.huge_pages import HugePages
from storage.stage_sources import SourceFile

RANGE_BYTES = 16 << 20
"""Unit of request and of resume."""

BIG_RANGE_BYTES = 64 << 20
"""The same for big files, where the price of a request weighs more than even work for all threads."""

_BIG_FILE_BYTES = 512 << 20
PARTIAL_SUFFIX = ".partial"
JOURNAL_SUFFIX = ".journal"

_DIGESTS = {SHA256: "SHA-256", GIT_BLOB: "Git SHA-1"}
"""Promises that only the whole file can be compared with."""

_READ_BYTES = 1 << 20
_ALIGNMENT = 4096  # of O_DIRECT offsets and lengths


class PartialFile:
    """One file being copied: its partial, its journal and the ranges still missing."""

    def __init__(self, folder: Path, file: SourceFile, *, direct: bool) -> None:
        self.file = file
        self.path = weight_files.safe_path(folder, file.name)
        self._partial = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        self._journal_path = self.path.with_name(self.path.name + JOURNAL_SUFFIX)
        promised = file.checksum.algorithm if file.checksum else ""
        self.algorithm: RangeAlgorithm = RANGE_ALGORITHMS.get(promised, CRC64NVME)
        self._range_bytes = range_bytes_of(file.size)
        self._header = json.dumps([file.size, file.etag, self._range_bytes, self.algorithm.name])
        self._checksums: dict[int, int] = {}
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Whole, but its model never was: it is checked again, under the name by which others may read it by now.
        self._place = self.path if self.path.exists() else self._partial
        self._fd, self._direct = _open_for_writing(self._place, direct)
        descriptor = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._journal = os.fdopen(descriptor, "a+", encoding="utf-8")

    @property
    def num_ranges(self) -> int:
        return -(-self.file.size // self._range_bytes)

    def span(self, index: int) -> tuple[int, int]:
        """First and last-plus-one byte of a range."""
        start = index * self._range_bytes
        return start, min(start + self._range_bytes, self.file.size)

    def missing(self) -> list[int]:
        """Ranges that are not on disk yet."""
        return [index for index in range(self.num_ranges) if index not in self._checksums]

    def resume(self) -> int:
        """Keep the journaled ranges whose bytes on disk still have the noted checksum; return their bytes."""
        kept = 0
        with self._place.open("rb") as partial:
            for index, noted in self._noted().items():
                start, end = self.span(index)
                if _checksum(partial, start, end, self.algorithm) == noted:
                    self._checksums[index] = noted
                    kept += end - start
        if self.missing() and self._place == self.path:
            self._place = self.path.rename(self._partial)
        self._journal.seek(0)
        self._journal.truncate()
        lines = [self._header, *(f"{index} {crc}" for index, crc in self._checksums.items())]
        self._journal.write("\n".join(lines) + "\n")
        self._journal.flush()
        return kept

    def allocate(self, huge: HugePages) -> int:
        """Reserve the file's blocks, so that a full disk shows now; return bytes on huge pages. Raises OSError."""
        if self._place == self.path:
            return 0
        huge_bytes = huge.reserve(self._fd, self.file.size)
        if self.file.size:
            os.posix_fallocate(
                self._fd, 0, _aligned(self.file.size) if self._direct else self.file.size
            )
        return huge_bytes

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
        os.rename(self._place, self.path)
        self.close()
        return found

    def discard(self) -> None:
        """Delete what was copied so far."""
        self.close()
        self._place.unlink(missing_ok=True)
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
        digest = _DIGESTS.get(want.algorithm) if want else None
        if want and digest and file_checksum(self._place, want.algorithm) != want:
            raise CorruptObject(
                f"{self.file.name}: its {digest} is not the one in {self.file.promised_by}; "
                "the copy was deleted; stage again, and check the source if it differs once more"
            )
        if weight_files.is_weights(self.file.name):
            weight_files.check_safetensors(self._place, name=self.file.name)

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


def range_bytes_of(file_bytes: int) -> int:
    """How big the ranges of a file are."""
    return BIG_RANGE_BYTES if file_bytes >= _BIG_FILE_BYTES else RANGE_BYTES


def _checksum(file: BinaryIO, start: int, end: int, algorithm: RangeAlgorithm) -> int:
    """Checksum of what a file holds between two places; of less when it ends before."""
    file.seek(start)
    value = 0
    while start < end and (block := file.read(min(_READ_BYTES, end - start))):
        value = algorithm.update(block, value)
        start += len(block)
    return value


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
