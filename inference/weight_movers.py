"""Bytes of safetensors files to tensors on a device, by threads that read while others copy.

    region of a file --one pread--> pinned buffer --async copies on the thread's own stream--> tensors

A region is a run of the file's bytes, whatever tensors they belong to: small tensors share one read,
big ones take several. On CPU a region is read straight into its tensors.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from inference.pinned_memory import give_back, take_pinned
from inference.weight_reader import Entry, Slice, WeightFileReader

PAGE_SLACK = 2 * 4096
"""Room that a region leaves in its buffer: O_DIRECT reads whole pages."""

BUFFER_BYTES = 32 << 20
"""Pinned, two a thread: one is filled while the other is copied."""

_MAX_SEGMENTS = 512  # of one region; preadv takes 1024


@dataclass(slots=True)
class Region:
    """A run of a file's bytes, and where they go: what one thread moves at once."""

    file: WeightFileReader
    offset: int
    max_bytes: int
    segments: list[torch.Tensor] = field(default_factory=list)
    """Flat uint8 pieces of the tensors to fill, in the order of their bytes."""

    num_bytes: int = 0
    ready: Any = None
    """CUDA event after which the tensors' memory is free to be written; None on CPU."""

    def room_at(self, file: WeightFileReader, offset: int) -> int:
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

    file: WeightFileReader
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

    def close(self) -> None:
        """Nothing to give back."""


class CudaMover:
    """Fills tensors on a CUDA device through each thread's own pinned buffers and stream."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        """`buffer_bytes`: of each pinned buffer; a region may be as long, less two pages."""
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._lanes = threading.local()
        self._all_lanes: list[_Lane] = []

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

    def close(self) -> None:
        """Wait for the last copies and give the buffers back."""
        for lane in self._all_lanes:
            lane.close()

    def _lane(self) -> "_Lane":
        if not hasattr(self._lanes, "lane"):
            torch.cuda.set_device(self._device)
            self._lanes.lane = _Lane(self._device, self._buffer_bytes)
            self._all_lanes.append(self._lanes.lane)
        lane: _Lane = self._lanes.lane
        return lane


class _Lane:
    """One thread's stream and its two pinned buffers."""

    def __init__(self, device: torch.device, buffer_bytes: int) -> None:
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._stream)  # of this thread, for good: it does nothing else
        self._buffer_bytes = buffer_bytes
        self._buffers: list[torch.Tensor] = []
        self._events: list[Any] = [None, None]
        self._turn = 1

    def next_buffer(self) -> torch.Tensor:
        """The buffer whose last copies are done, or are waited for."""
        self._turn ^= 1
        if len(self._buffers) <= self._turn:  # each when it is needed: others copy meanwhile
            self._buffers.append(take_pinned(self._buffer_bytes))
        if self._events[self._turn] is not None:
            self._events[self._turn].synchronize()
        return self._buffers[self._turn]

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], ready: Any) -> Any:
        """Start copies (to, from), from the buffer last handed out; return the event at their end."""
        self._stream.wait_event(ready)
        for target, host in pairs:
            target.copy_(host, non_blocking=True)
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        self._events[self._turn] = event
        return event

    def close(self) -> None:
        """Wait for the last copies and give the buffers back."""
        self._stream.synchronize()
        while self._buffers:
            give_back(self._buffers.pop())
