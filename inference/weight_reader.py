"""Bytes of safetensors files to tensors on a device, by threads that read while others copy.

    file --pread--> pinned buffer --async copy on the thread's own stream--> tensor

On CPU the file is read straight into the tensor. On CUDA, files that the page cache does not hold are
read with O_DIRECT.
"""

import errno
import json
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from inference.errors import ModelError
from inference.weights import check_weight_file

BUFFER_BYTES = 32 << 20
"""Pinned, two a thread: one is filled while the other is copied."""

_ALIGNMENT = 4096  # of O_DIRECT offsets, lengths and memory
_CHUNK_BYTES = BUFFER_BYTES - 2 * _ALIGNMENT
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


class Chunk(NamedTuple):
    """What one thread moves at once: a run of bytes, or rows of a slice."""

    file: "WeightFileReader"
    entry: Entry
    part: Slice | None
    target: torch.Tensor
    start: int
    stop: int
    """Of the target's bytes; for a slice across rows, of its rows."""

    ready: Any
    """CUDA event after which the target's memory is free to be written; None on CPU."""


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

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the file's bytes from `offset` on. Raises ModelError."""
        self._fill(self._fd, offset, view, len(view))

    def read_aligned(self, offset: int, count: int, buffer: memoryview) -> int:
        """Read `count` bytes into a page-aligned buffer with room for two pages more.

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


def chunks_of(
    file: WeightFileReader,
    entry: Entry,
    part: Slice | None,
    target: torch.Tensor,
    *,
    ready: Any = None,
) -> Iterator[Chunk]:
    """Cut the loading of one tensor into what threads do at once."""
    if part and part.dim > 0:
        row_bytes = max(1, target.nbytes // max(1, target.shape[0]))
        total, step = target.shape[0], max(1, BUFFER_BYTES // row_bytes)
    else:
        total, step = target.nbytes, _CHUNK_BYTES
    for start in range(0, total, step):
        yield Chunk(file, entry, part, target, start, min(start + step, total), ready)


class HostMover:
    """Fills tensors in host memory."""

    def move(self, chunk: Chunk) -> None:
        """Do one chunk. Raises ModelError."""
        if _is_across_rows(chunk):
            chunk.target[chunk.start : chunk.stop].copy_(_rows(chunk))
        else:
            flat = chunk.target.reshape(-1).view(torch.uint8)[chunk.start : chunk.stop]
            chunk.file.read(_file_offset(chunk), flat.numpy().data)


class CudaMover:
    """Fills tensors on a CUDA device through each thread's own pinned buffers and stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lanes = threading.local()

    def move(self, chunk: Chunk) -> Any:
        """Do one chunk; return the event after which it is on the device. Raises ModelError."""
        lane = self._lane()
        buffer = lane.next_buffer()
        if _is_across_rows(chunk):
            rows = _rows(chunk)
            target = chunk.target[chunk.start : chunk.stop]
            if rows.nbytes > BUFFER_BYTES:  # one enormous row
                return lane.copy(target, rows.contiguous(), chunk.ready)
            host = buffer[: rows.nbytes].view(rows.dtype).view(rows.shape)
            return lane.copy(target, host.copy_(rows), chunk.ready)
        count = chunk.stop - chunk.start
        begin = chunk.file.read_aligned(_file_offset(chunk), count, buffer.numpy().data)
        target = chunk.target.reshape(-1).view(torch.uint8)[chunk.start : chunk.stop]
        return lane.copy(target, buffer[begin : begin + count], chunk.ready)

    def _lane(self) -> "_Lane":
        if not hasattr(self._lanes, "lane"):
            torch.cuda.set_device(self._device)
            self._lanes.lane = _Lane(self._device)
        lane: _Lane = self._lanes.lane
        return lane


class _Lane:
    """One thread's stream and its two pinned buffers."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = [
            torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]
        self._events: list[Any] = [None, None]
        self._turn = 0

    def next_buffer(self) -> torch.Tensor:
        """The buffer whose last copy is done, or is waited for."""
        self._turn ^= 1
        if self._events[self._turn] is not None:
            self._events[self._turn].synchronize()
        return self._buffers[self._turn]

    def copy(self, target: torch.Tensor, host: torch.Tensor, ready: Any) -> Any:
        """Start a copy, from the buffer last handed out; return the event at its end."""
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            target.copy_(host, non_blocking=True)
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        self._events[self._turn] = event
        return event


def _is_across_rows(chunk: Chunk) -> bool:
    return chunk.part is not None and chunk.part.dim > 0


def _rows(chunk: Chunk) -> torch.Tensor:
    """The slice's rows as they lie in the file, strided."""
    assert chunk.part is not None, "only a slice has rows to pick from"
    dim, start, stop = chunk.part
    whole = chunk.file.mapped(chunk.entry)
    return whole.narrow(dim, start, stop - start)[chunk.start : chunk.stop]


def _file_offset(chunk: Chunk) -> int:
    """Where in the file the chunk's bytes begin, for whole tensors and slices of dimension 0."""
    offset = chunk.entry.offset + chunk.start
    if chunk.part:
        row_elements = torch.Size(chunk.entry.shape[1:]).numel()
        offset += chunk.part.start * row_elements * chunk.entry.dtype.itemsize
    return offset


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
