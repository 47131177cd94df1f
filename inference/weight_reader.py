"""Safetensors files, open for reading by several threads: their tensors, any bytes of theirs, any slice.

On CUDA, files that the page cache does not hold are read with O_DIRECT, and those in /dev/shm are copied out of a
mapping, which takes a fifth less time there than reading them (16 threads beside an H100: 40 instead of 33 GB/s).
"""

import ctypes
import errno
import json
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from inference.errors import ModelError
from inference.weights import check_weight_file

_ALIGNMENT = 4096  # of O_DIRECT offsets, lengths and memory
_NUM_PROBES = 8
_MEMORY = "/dev/shm"
_RELEASED_BYTES = 64 << 20
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Slice(NamedTuple):
    """The part of a tensor that one rank holds: [start, stop) of one dimension."""

    dim: int
    start: int
    stop: int

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape, given the whole tensor's."""
        return (*shape[: self.dim], self.stop - self.start, *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Byte of the file where its data begins."""


class WeightFileReader:
    """A checked safetensors file, open for reading by several threads."""

    def __init__(self, path: Path, *, direct: bool) -> None:
        """`direct`: read past the page cache what it does not hold. Raises ModelError."""
        checked = check_weight_file(path)
        self.path = path
        self.num_bytes = checked.num_bytes
        self.entries = _entries(path, checked.header)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct_fd = self._open_direct() if direct and not self._is_cached() else -1
        self._map: mmap.mmap | None = None
        self._memory: _MappedFile | None = None
        self._is_in_memory = direct and _device_of(path) == _device_of(_MEMORY)
        self._lock = threading.Lock()

    @property
    def is_direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self._direct_fd >= 0

    def read(self, offset: int, views: list[memoryview]) -> None:
        """Fill the views, one after the other, with the file's bytes from `offset` on. Raises ModelError."""
        try:
            count = os.preadv(self._fd, views, offset)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read: {error.strerror}") from error
        for view in views:  # whatever one call left out
            if count < len(view):
                self._fill(self._fd, offset + count, view[count:], len(view) - count)
            offset += len(view)
            count = max(0, count - len(view))

    def read_aligned(self, offset: int, count: int, buffer: memoryview) -> int:
        """Read `count` bytes into a page-aligned buffer that has room for two pages more.

        Returns:
            Where in the buffer they begin.

        Raises:
            ModelError: they cannot be read, or the file ends before.
        """
        if self._is_in_memory:
            self._copy(offset, count, buffer)
            return 0
        if not self.is_direct:
            self._fill(self._fd, offset, buffer[:count], count)
            return 0
        skipped = offset % _ALIGNMENT
        pages = -(-(skipped + count) // _ALIGNMENT) * _ALIGNMENT
        self._fill(self._direct_fd, offset - skipped, buffer[:pages], skipped + count)
        return skipped

    def mapped(self, entry: Entry) -> torch.Tensor:
        """The whole tensor over a private mapping of the file; pages are read when touched. Raises ModelError."""
        self._check_length(entry.offset + entry.dtype.itemsize * torch.Size(entry.shape).numel())
        with self._lock:
            if self._map is None:
                self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        count = entry.dtype.itemsize * torch.Size(entry.shape).numel()
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=entry.offset)
        return flat.view(entry.dtype).view(entry.shape)

    def close(self) -> None:
        """Close the file, when no thread reads it any more; a mapping lives as long as tensors over it."""
        if self._memory is not None:
            self._memory.release_later()
        os.close(self._fd)
        if self.is_direct:
            os.close(self._direct_fd)

    def _copy(self, offset: int, count: int, buffer: memoryview) -> None:
        self._check_length(offset + count)
        with self._lock:
            try:
                self._memory = self._memory or _MappedFile(self._fd)
            except OSError as error:
                raise ModelError(f"{self.path}: cannot be mapped: {error.strerror}") from error
        target = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        ctypes.memmove(target, self._memory.address + offset, count)

    def _check_length(self, num_bytes: int) -> None:
        """Before a mapping is read: touching a page past the file's end would be the end of the process."""
        if (size := os.fstat(self._fd).st_size) < num_bytes:
            raise ModelError(f"{self.path}: ends at byte {size}; stage it again")

    def _fill(self, fd: int, offset: int, view: memoryview, needed: int) -> None:
        """Read at least `needed` bytes into `view`; O_DIRECT asks for whole pages, past the end too."""
        filled = 0
        while filled < needed:
            try:
                count = os.preadv(fd, [view[filled:]], offset + filled)
            except OSError as error:
                raise ModelError(f"{self.path}: cannot be read: {error.strerror}") from error
            if not count:
                raise ModelError(f"{self.path}: ends at byte {offset + filled}; stage it again")
            filled += count

    def _is_cached(self) -> bool:
        """Whether the page cache holds the file, judged by a few of its pages."""
        step = max(_ALIGNMENT, self.num_bytes // _NUM_PROBES)
        try:
            for offset in range(0, self.num_bytes, step):
                os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # as on tmpfs, which is memory anyway
                raise
        return True

    def _open_direct(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:  # this file system has no O_DIRECT
            return -1


class _MappedFile:
    """A file in memory, mapped to be read."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self.address: int = np.frombuffer(self._map, np.uint8).ctypes.data

    def release_later(self) -> None:
        """Unmap it on a thread of its own: letting go of small pages takes 33 ms a GB, half as long as copying them."""
        threading.Thread(target=self._release, name="unmap", daemon=True).start()

    def _release(self) -> None:
        # Its pages first, by a call that does not hold the interpreter's lock; what is left is quick.
        for start in range(0, len(self._map), _RELEASED_BYTES):
            size = min(_RELEASED_BYTES, len(self._map) - start)
            _libc.madvise(self.address + start, size, mmap.MADV_DONTNEED)
        self._map.close()


def stored_dtype(path: Path) -> torch.dtype | None:
    """Return the element type of a file's first tensor that is not quantised; None: all are. Raises ModelError."""
    full = (torch.float32, torch.float16, torch.bfloat16)
    entries = _entries(path, check_weight_file(path).header)
    return next((entry.dtype for entry in entries if entry.dtype in full), None)


def _device_of(path: str | Path) -> int | None:
    """Return the number of the file system that a path is on; None if there is nothing."""
    try:
        return os.stat(path).st_dev
    except FileNotFoundError:
        return None


def _entries(path: Path, header: bytes) -> list[Entry]:
    """Tensors in the order of their bytes."""
    data_offset = 8 + len(header)
    found = json.loads(header)
    found.pop("__metadata__", None)
    entries = []
    for name, fields in sorted(found.items(), key=lambda item: item[1]["data_offsets"][0]):
        if fields["dtype"] not in _DTYPES:
            raise ModelError(
                f"{path}: tensor {name} has dtype {fields['dtype']}, which is not known"
            )
        entries.append(
            Entry(
                name=name,
                dtype=_DTYPES[fields["dtype"]],
                shape=tuple(fields["shape"]),
                offset=data_offset + fields["data_offsets"][0],
            )
        )
    return entries
