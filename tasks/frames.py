"""Frames between a feed and its child: a length-prefixed JSON header and an optional payload.

Also the flight recorder: three numbers in memory both processes map, which the child keeps up to date
(stage, first row, end row), so that a parent whose child died knows what it was doing.
"""

import json
import mmap
import os
import select
import struct
import tempfile
import time
from typing import Any, NamedTuple

_PREFIX = struct.Struct("<IQ")
_RECORD = struct.Struct("<qqq")
_READ_BYTES = 1 << 20

IDLE, READING, RENDERING, ENCODING = range(4)


class Frame(NamedTuple):
    """One message."""

    header: dict[str, Any]
    payload: memoryview | bytes


class Deadline(Exception):
    """The other side took too long."""


class Flight(NamedTuple):
    """What the child was doing."""

    stage: int
    row_start: int
    row_end: int


class Recorder:
    """The shared numbers; the parent makes them, the child opens them by descriptor."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the recorder)
            # Written, not only made so long: on a full disk a mapped hole kills whoever touches it.
            self._file.write(bytes(mmap.PAGESIZE))
            self._file.flush()
            descriptor = self._file.fileno()
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)

    def write(self, stage: int, row_start: int = 0, row_end: int = 0) -> None:
        _RECORD.pack_into(self._memory, 0, stage, row_start, row_end)

    def read(self) -> Flight:
        return Flight(*_RECORD.unpack_from(self._memory, 0))

    def close(self) -> None:
        self._memory.close()
        self._file.close()


def write_frame(descriptor: int, header: dict[str, Any], payload: Any = b"") -> None:
    """Write one frame whole.

    Raises:
        BrokenPipeError: the other side is gone.
    """
    text = json.dumps(header).encode()
    view = memoryview(payload).cast("B")
    _write_all(descriptor, memoryview(_PREFIX.pack(len(text), len(view)) + text))
    _write_all(descriptor, view)


def read_frame(descriptor: int, timeout_s: float | None = None) -> Frame | None:
    """Read one frame; None at the end of the stream (also in the middle of a frame).

    Raises:
        Deadline: nothing whole arrived in time.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    prefix = _read_exactly(descriptor, _PREFIX.size, deadline)
    if prefix is None:
        return None
    text_bytes, payload_bytes = _PREFIX.unpack(prefix)
    text = _read_exactly(descriptor, text_bytes, deadline)
    payload = _read_exactly(descriptor, payload_bytes, deadline)
    if text is None or payload is None:
        return None
    return Frame(json.loads(bytes(text)), payload)


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view[:_READ_BYTES]) :]


def _read_exactly(descriptor: int, count: int, deadline: float | None) -> memoryview | None:
    buffer = memoryview(bytearray(count))
    filled = 0
    poller = select.poll()
    poller.register(descriptor, select.POLLIN | select.POLLHUP)
    while filled < count:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                raise Deadline
        got = os.readv(descriptor, [buffer[filled : filled + _READ_BYTES]])
        if got == 0:
            return None
        filled += got
    return buffer
