"""Every tensor of a model's safetensors files, on the device, one after the other.

    for name, tensor in load_weights(paths, device="cuda"):
        parameters[name].copy_(tensor)

Two ways: `safetensors`, the library's own (the fallback, and the default on CPU), and `parallel`, which
keeps disk, processor and bus busy together (`inference.weight_movers`). Under tensor parallel a rank
asks for its slices only.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from inference.model_shape import MAX_AHEAD_BYTES
from inference.pinned_memory import make_ready
from inference.weight_movers import (
    BUFFER_BYTES,
    PAGE_SLACK,
    CudaMover,
    HostMover,
    Region,
    offset_of,
    rows_of,
)
from inference.weight_reader import Entry, Slice, WeightFileReader
from inference.weights import check_weight_file

Slicer = Callable[[str, tuple[int, ...]], Slice | None]
"""(name, shape in the file) -> this rank's part; None for all of it."""

Destination = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor | None]
"""(name, shape, dtype of what is loaded) -> the contiguous tensor to fill; None to allocate one."""


def load_weights(
    paths: Iterable[Path],
    *,
    device: str | torch.device = "cpu",
    method: Literal["auto", "safetensors", "parallel"] = "auto",
    slicer: Slicer | None = None,
    destination: Destination | None = None,
    num_threads: int | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for every tensor of the files, in the files' order, on `device`.

    Args:
        paths: taken one by one as they are needed, so it may wait for files that are on their way.
        method: auto is parallel on CUDA, else safetensors.
        slicer: which part of each tensor to load.
        destination: where to, such as the parameters themselves, so that no second copy is ever on
            the device.
        num_threads: readers, each with two pinned buffers of `buffer_bytes` on CUDA; default:
            `default_threads`.
        buffer_bytes: most bytes that are read at once.

    Raises:
        ModelError: a file is missing, truncated, unreadable, or of an unknown dtype.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    slicer = slicer or (lambda name, shape: None)
    destination = destination or (lambda name, shape, dtype: None)
    if method == "parallel" or (method == "auto" and device.type == "cuda"):
        threads = num_threads or default_threads()
        loader = _Loader(device, slicer, destination, threads, buffer_bytes)
        return _parallel(paths, loader)
    return _plain(paths, device, slicer, destination)


def default_threads() -> int:
    """Return how many readers this process's share of the cores is worth: one each, 4 to 16.

    By measurement on one H100 with 16 cores: from /dev/shm with buffers of 32 MiB, 24.7 GB/s with 8 readers and
    33.9 with 16. Fewer than 4 would leave a disk idle between their reads. Ranks of a host share its cores.
    """
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as launchers of ranks set it
    return max(4, min(16, len(os.sched_getaffinity(0)) // num_ranks))


def make_buffers_ready(device: torch.device, num_weight_bytes: int) -> None:
    """Begin to make ready what files of so many bytes are read through on a CUDA device; `load_weights` waits for it.

    The first load of a process would else spend a tenth of a second or two on it.
    """
    num_threads = default_threads()
    count = min(2 * num_threads, math.ceil(num_weight_bytes / BUFFER_BYTES))
    make_ready(count, BUFFER_BYTES, device, num_threads=num_threads)


def _plain(
    paths: Iterable[Path], device: torch.device, slicer: Slicer, destination: Destination
) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for path in paths:
        check_weight_file(path)
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.offset_keys():
                view = file.get_slice(name)
                part = slicer(name, tuple(view.get_shape()))
                if part:
                    index = (slice(None),) * part.dim + (slice(part.start, part.stop),)
                    tensor = view[index].contiguous()
                else:
                    tensor = file.get_tensor(name)
                target = destination(name, tuple(tensor.shape), tensor.dtype)
                yield name, tensor if target is None else target.copy_(tensor)


def _parallel(paths: Iterable[Path], loader: "_Loader") -> Iterator[tuple[str, torch.Tensor]]:
    try:
        for path in paths:
            for entry in loader.open(path):
                loader.start(entry)
                while loader.ahead_bytes > MAX_AHEAD_BYTES:
                    yield loader.finish()
            loader.flush()  # the next path may be long in coming
        while loader.ahead_bytes:
            yield loader.finish()
    finally:
        loader.close()


@dataclass(slots=True, eq=False)
class _Loading:
    """A tensor on its way."""

    name: str
    tensor: torch.Tensor
    moves: list["Future[Any]"] = field(default_factory=list)


class _Loader:
    """Starts tensors in order and hands them out in order; threads do the work in between."""

    def __init__(
        self,
        device: torch.device,
        slicer: Slicer,
        destination: Destination,
        num_threads: int,
        buffer_bytes: int,
    ) -> None:
        self._device = device
        self._slicer = slicer
        self._destination = destination
        self._is_cuda = device.type == "cuda"
        self._mover: Any = CudaMover(device, buffer_bytes) if self._is_cuda else HostMover()
        self._max_bytes = buffer_bytes - PAGE_SLACK
        self._pool = ThreadPoolExecutor(num_threads)
        self._files: list[WeightFileReader] = []
        self._waiting: deque[_Loading] = deque()
        self._region: Region | None = None
        self._in_region: list[_Loading] = []
        self.ahead_bytes = 0
        """Of tensors that were started and not handed out; empty ones count as one byte."""

    def open(self, path: Path) -> list[Entry]:
        """Take on one more file; return its tensors."""
        self._files.append(WeightFileReader(path, direct=self._is_cuda))
        return self._files[-1].entries

    def start(self, entry: Entry) -> None:
        """Begin to load one tensor of the file opened last."""
        part = self._slicer(entry.name, entry.shape)
        shape = part.shape_of(entry.shape) if part else entry.shape
        target = self._destination(entry.name, shape, entry.dtype)
        if target is None:
            target = torch.empty(shape, dtype=entry.dtype, device=self._device)
        assert target.is_contiguous(), f"{entry.name}: the destination is not contiguous"
        assert (tuple(target.shape), target.dtype) == (shape, entry.dtype), entry.name
        loading = _Loading(entry.name, target)
        self._waiting.append(loading)
        self.ahead_bytes += max(1, target.nbytes)
        if part and part.dim > 0:
            self._start_rows(entry, part, loading)
        else:
            self._start_bytes(offset_of(entry, part), loading)

    def finish(self) -> tuple[str, torch.Tensor]:
        """Wait for the tensor in front. Raises ModelError."""
        loading = self._waiting.popleft()
        if loading in self._in_region:
            self.flush()
        for move in loading.moves:
            if (event := move.result()) is not None:
                torch.cuda.current_stream(self._device).wait_event(event)
        self.ahead_bytes -= max(1, loading.tensor.nbytes)
        return loading.name, loading.tensor

    def flush(self) -> None:
        """Hand the region that is being put together to the threads."""
        region, self._region = self._region, None
        if region is not None:
            region.ready = self._event()
            move = self._pool.submit(self._mover.move, region)
            for loading in self._in_region:
                loading.moves.append(move)
            self._in_region.clear()

    def close(self) -> None:
        """Stop the threads, once the copies they have started are done, and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._mover.close()
        for file in self._files:
            file.close()

    def _start_bytes(self, offset: int, loading: _Loading) -> None:
        """Add a tensor's bytes to the region in hand, and to as many more as it takes."""
        file, whole = self._files[-1], loading.tensor.view(-1).view(torch.uint8)
        start, num_bytes = 0, whole.nbytes
        while start < num_bytes:
            room = self._region.room_at(file, offset + start) if self._region else 0
            if not room or self._region is None:
                self.flush()
                self._region = Region(file, offset + start, self._max_bytes)
                room = self._max_bytes
            stop = min(start + room, num_bytes)
            self._region.add(whole if stop - start == num_bytes else whole[start:stop])
            self._in_region.append(loading)
            start = stop

    def _start_rows(self, entry: Entry, part: Slice, loading: _Loading) -> None:
        for rows in rows_of(
            self._files[-1], entry, part, loading.tensor, max_bytes=self._max_bytes
        ):
            move = self._pool.submit(self._mover.move, rows._replace(ready=self._event()))
            loading.moves.append(move)

    def _event(self) -> Any:
        """After which memory that the allocator handed out again is read by nothing queued before."""
        return torch.cuda.current_stream(self._device).record_event() if self._is_cuda else None
