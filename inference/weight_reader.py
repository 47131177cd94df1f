"""Bytes of safetensors files to tensors on a device, by threads that read while others copy.

    region of a file --one pread--> pinned buffer --async copies on the thread's own stream--> tensors

A region is a run of the file's bytes, whatever tensors they belong to: small tensors share one read,
big ones take several. On CPU a region is read straight into its tensors. On CUDA, files that the page
cache does not hold are read with O_DIRECT.
"""

import errno
import json
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from inference.errors import ModelError
from inference.weights import check_weight_file

PAGE_SLACK = 2 * 4096
"""Room that a region leaves in its buffer: O_DIRECT reads whole pages."""

BUFFER_BYTES = 32 << 20
"""Pinned, two a thread: one is filled while the other is copied."""

_ALIGNMENT = 4096  # of O_DIRECT offsets, lengths and memory
_MAX_SEGMENTS = 512  # of one region; preadv takes 1024
_NUM_PROBES = 8
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


@dataclass(slots=True)
class Region:
    """A run of a file's bytes, and where they go: what one thread moves at once."""

    file: "WeightFileReader"
    offset: int
    max_bytes: int
    segments: list[torch.Tensor] = field(default_factory=list)
    """Flat uint8 pieces of the tensors to fill, in the order of their bytes."""

    num_bytes: int = 0
    ready: Any = None
    """CUDA event after which the tensors' memory is free to be written; None on CPU."""

    def room_at(self, file: "WeightFileReader", offset: int) -> int:
        """How many of the file's bytes from `offset` on this region can take in; 0 elsewhere."""
        is_next = file is self.file and offset == self.offset + self.num_bytes
        is_full = len(self.segments) == _MAX_SEGMENTS
        return self.max_bytes - self.num_bytes if is_next and not is_full else 0

    def add(self, segment: torch.Tensor) -> None:
        """Take in the bytes that follow."""
        self.segments.append(segment)
        self.num_bytes += segment.nbytes


class Rows(NamedTuple):
    """Rows of a slice across rows, whose bytes lie apart in the file."""

    file: "WeightFileReader"
    entry: Entry
    part: Slice
    target: torch.Tensor
    """The rows to fill."""

    first: int
    """Of them in the whole tensor."""

    ready: Any = None

    def in_file(self) -> torch.Tensor:
        """The same rows as they lie in the file, strided."""
        dim, start, stop = self.part
        whole = self.file.mapped(self.entry).narrow(dim, start, stop - start)
        return whole[self.first : self.first + self.target.shape[0]]


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
        """
        if not self.is_direct:
            self._fill(self._fd, offset, buffer[:count], count)
            return 0
        skipped = offset % _ALIGNMENT
        pages = -(-(skipped + count) // _ALIGNMENT) * _ALIGNMENT
        self._fill(self._direct_fd, offset - skipped, buffer[:pages], skipped + count)
        return skipped

    def mapped(self, entry: Entry) -> torch.Tensor:
        """The whole tensor over a private mapping of the file; pages are read when touched."""
        with self._lock:
            if self._map is None:
                self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        count = entry.dtype.itemsize * torch.Size(entry.shape).numel()
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=entry.offset)
        return flat.view(entry.dtype).view(entry.shape)

    def close(self) -> None:
        """Close the file; a mapping lives as long as tensors over it."""
        os.close(self._fd)
        if self.is_direct:
            os.close(self._direct_fd)

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


def rows_of(
    file: WeightFileReader, entry: Entry, part: Slice, target: torch.Tensor, *, max_bytes: int
) -> Iterator[Rows]:
    """Cut a slice across rows into runs of rows."""
    row_bytes = max(1, target.nbytes // max(1, target.shape[0]))
    step = max(1, max_bytes // row_bytes)
    for first in range(0, target.shape[0], step):
        yield Rows(file, entry, part, target[first : first + step], first)


def offset_of(entry: Entry, part: Slice | None) -> int:
    """Where in the file a whole tensor, or a slice of its rows, begins."""
    if part is None:
        return entry.offset
    row_elements = torch.Size(entry.shape[1:]).numel()
    return entry.offset + part.start * row_elements * entry.dtype.itemsize


class HostMover:
    """Fills tensors in host memory."""

    def move(self, work: Region | Rows) -> None:
        """Do one piece of work. Raises ModelError."""
        if isinstance(work, Rows):
            work.target.copy_(work.in_file())
        else:
            work.file.read(work.offset, [segment.numpy().data for segment in work.segments])


class CudaMover:
    """Fills tensors on a CUDA device through each thread's own pinned buffers and stream."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        """`buffer_bytes`: of each pinned buffer; a region may be as long, less two pages."""
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._lanes = threading.local()

    def move(self, work: Region | Rows) -> Any:
        """Do one piece of work; return the event after which it is on the device. Raises ModelError."""
        lane = self._lane()
        buffer = lane.next_buffer()
        if isinstance(work, Rows):
            rows = work.in_file()
            if rows.nbytes > self._buffer_bytes:  # one enormous row
                return lane.copy([(work.target, rows.contiguous())], work.ready)
            host = buffer[: rows.nbytes].view(rows.dtype).view(rows.shape)
            return lane.copy([(work.target, host.copy_(rows))], work.ready)
        begin = work.file.read_aligned(work.offset, work.num_bytes, buffer.numpy().data)
        sizes = [segment.nbytes for segment in work.segments]
        pieces = torch.split(buffer[begin : begin + work.num_bytes], sizes)
        return lane.copy(list(zip(work.segments, pieces, strict=True)), work.ready)

    def _lane(self) -> "_Lane":
        if not hasattr(self._lanes, "lane"):
            torch.cuda.set_device(self._device)
            self._lanes.lane = _Lane(self._device, self._buffer_bytes)
        lane: _Lane = self._lanes.lane
        return lane


class _Lane:
    """One thread's stream and its two pinned buffers."""

    def __init__(self, device: torch.device, buffer_bytes: int) -> None:
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]
        self._events: list[Any] = [None, None]
        self._turn = 0

    def next_buffer(self) -> torch.Tensor:
        """The buffer whose last copies are done, or are waited for."""
        self._turn ^= 1
        if self._events[self._turn] is not None:
            self._events[self._turn].synchronize()
        return self._buffers[self._turn]

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], ready: Any) -> Any:
        """Start copies (to, from), from the buffer last handed out; return the event at their end."""
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            for target, host in pairs:
                target.copy_(host, non_blocking=True)
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        self._events[self._turn] = event
        return event


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
