"""Bytes of files to where they are wanted, without a loader: no tensors, no order, nothing but the moving.

read         preadv into a buffer
mapped       copied out of a mapping of the file; every page of it is met for the first time
populated    the same, after the kernel was asked to map the whole region at once
registered   the mapping itself is pinned, region by region, and the device reads it: no copy on the host
"""

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

Way = Literal["read", "mapped", "populated", "registered"]
HOST_WAYS: tuple[Way, ...] = ("read", "mapped", "populated")
DEVICE_WAYS: tuple[Way, ...] = ("read", "mapped", "populated", "registered")

_MADV_POPULATE_READ = 22
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def into_memory(paths: list[Path], way: Way, num_threads: int, buffer_mib: int) -> float:
    """GB/s of regions into ordinary memory that is warm, one buffer a thread."""
    size = buffer_mib << 20
    regions = _regions(paths, size)
    buffers = [torch.ones(size, dtype=torch.uint8) for _ in range(num_threads)]

    def drain(index: int) -> None:
        for path, offset in regions[index::num_threads]:
            files[path].fill(buffers[index], offset)

    with ThreadPoolExecutor(num_threads) as pool, ExitStack() as stack:
        began = time.perf_counter()
        files = {path: stack.enter_context(BareFile(path, way)) for path in paths}
        list(pool.map(drain, range(num_threads)))
        seconds = time.perf_counter() - began
    return len(regions) * size / seconds / 1e9


def to_device(paths: list[Path], way: Way, num_threads: int, buffer_mib: int) -> float:
    """GB/s of regions to one piece of device memory, two pinned buffers a thread."""
    size = buffer_mib << 20
    regions = _regions(paths, size)
    device = torch.empty(len(regions) * size, dtype=torch.uint8, device="cuda")
    kind = _RegisteringLane if way == "registered" else _Lane
    lanes = [kind(size) for _ in range(num_threads)]

    def drain(index: int) -> None:
        for number in range(index, len(regions), num_threads):
            path, offset = regions[number]
            lanes[index].move(files[path], offset, device[number * size : (number + 1) * size])
        lanes[index].finish()

    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(2):  # the threads and their streams are made in the first round
            with ExitStack() as stack:
                torch.cuda.synchronize()
                began = time.perf_counter()
                files = {path: stack.enter_context(BareFile(path, way)) for path in paths}
                list(pool.map(drain, range(num_threads)))
                torch.cuda.synchronize()
                seconds = time.perf_counter() - began
    return device.nbytes / seconds / 1e9


def _regions(paths: list[Path], size: int) -> list[tuple[Path, int]]:
    return [
        (path, offset)
        for path in paths
        for offset in range(0, path.stat().st_size - size + 1, size)
    ]


class BareFile:
    """A file's bytes, read or copied from a mapping that is new."""

    def __init__(self, path: Path, way: Way) -> None:
        self._way = way
        self._fd = os.open(path, os.O_RDONLY)
        self.mapping: torch.Tensor | None = None
        if way != "read":
            # Shared: what is pinned of a private mapping is copied first.
            size = path.stat().st_size
            self.mapping = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)

    def __enter__(self) -> "BareFile":
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)
        self.mapping = None

    def fill(self, buffer: torch.Tensor, offset: int) -> None:
        """Fill a buffer with the bytes from `offset` on. Raises OSError."""
        if self.mapping is None:
            count = os.preadv(self._fd, [buffer.numpy().data], offset)
            assert count == buffer.nbytes, f"{count} of {buffer.nbytes} bytes were read"
            return
        source = self.mapping.data_ptr() + offset
        if self._way == "populated" and _libc.madvise(source, buffer.nbytes, _MADV_POPULATE_READ):
            raise OSError(ctypes.get_errno(), "MADV_POPULATE_READ needs Linux 5.14")
        # Not torch's copy: that one would share itself out over threads of its own.
        ctypes.memmove(buffer.data_ptr(), source, buffer.nbytes)


class _Lane:
    """A stream and two pinned buffers."""

    def __init__(self, size: int) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0
        self._sources = self._make_sources(size)

    def move(self, file: BareFile, offset: int, target: torch.Tensor) -> None:
        """Start one region on its way."""
        self._turn ^= 1
        self._events[self._turn].synchronize()
        source = self._take(file, offset, target.nbytes)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._events[self._turn].record(self._stream)

    def finish(self) -> None:
        """Wait for what is on its way."""
        self._stream.synchronize()

    def _make_sources(self, size: int) -> list[torch.Tensor]:
        return [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]

    def _take(self, file: BareFile, offset: int, size: int) -> torch.Tensor:
        file.fill(self._sources[self._turn], offset)
        return self._sources[self._turn]


class _RegisteringLane(_Lane):
    """A stream, and two regions of files that are pinned where they lie."""

    def finish(self) -> None:
        super().finish()
        for turn in range(2):
            self._release(turn)

    def _make_sources(self, size: int) -> list[torch.Tensor]:
        return [torch.empty(0)] * 2

    def _take(self, file: BareFile, offset: int, size: int) -> torch.Tensor:
        assert file.mapping is not None
        self._release(self._turn)
        source = file.mapping[offset : offset + size]
        code = torch.cuda.cudart().cudaHostRegister(source.data_ptr(), size, 0)
        assert int(code) == 0, f"cudaHostRegister of a file in memory: {code}"
        self._sources[self._turn] = source
        return source

    def _release(self, turn: int) -> None:
        if self._sources[turn].nbytes:
            torch.cuda.cudart().cudaHostUnregister(self._sources[turn].data_ptr())
            self._sources[turn] = torch.empty(0)
