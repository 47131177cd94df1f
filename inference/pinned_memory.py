"""Pinned host memory that is had at once, and kept for the next who needs as much.

torch's own pinned allocations (`cudaHostAlloc`) fault their pages in one by one under one lock: 0.45 s a GiB, however
many threads ask. Here every thread touches its own pages first, huge ones where it can, and has CUDA register what is
there: 0.085 s a GiB with 16 threads beside an H100.
"""

import ctypes
import mmap
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

_HUGE_PAGE_BYTES = 2 << 20
_libc = ctypes.CDLL(None)
_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_changed = threading.Condition()
_free: dict[int, list[torch.Tensor]] = defaultdict(list)
"""By their bytes."""

_num_coming: dict[int, int] = defaultdict(int)
"""By their bytes: those that are being made ready."""

_registered: list[torch.Tensor] = []
"""All there is: were one let go of, CUDA would take whatever is mapped in its place for it."""


def make_ready(count: int, num_bytes: int, device: torch.device, *, num_threads: int) -> None:
    """Begin to make `count` pieces of pinned memory on threads; `take_pinned` waits for them rather than make more.

    Called before something else takes its time, so that whoever takes the memory then finds it.

    Args:
        count: how many there are to be, those that are free by now among them.
        num_bytes: of each; whole pages.
        device: whose driver is asked, on threads that would else ask the first device's.
        num_threads: how many are made at once.
    """
    with _changed:
        missing = max(0, count - len(_free[num_bytes]) - _num_coming[num_bytes])
        _num_coming[num_bytes] += missing
    pool = ThreadPoolExecutor(num_threads, "nightjar-pinned")
    for _ in range(missing):
        pool.submit(_make_one, num_bytes, device)
    pool.shutdown(wait=False)


def take_pinned(num_bytes: int) -> torch.Tensor:
    """Return pinned memory, flat uint8 and page-aligned, with whatever is in it; `num_bytes` are whole pages."""
    with _changed:
        _changed.wait_for(lambda: _free[num_bytes] or not _num_coming[num_bytes])
        if _free[num_bytes]:
            return _free[num_bytes].pop()
    return _made(num_bytes)


def give_back(memory: torch.Tensor) -> None:
    """Take back what `take_pinned` returned, when no copy from or to it is under way."""
    with _changed:
        _free[memory.nbytes].append(memory)
        _changed.notify_all()


def _make_one(num_bytes: int, device: torch.device) -> None:
    """Make one piece for `make_ready`; where that fails, whoever takes memory meets the error."""
    try:
        torch.cuda.set_device(device)
        give_back(_made(num_bytes))
    finally:
        with _changed:
            _num_coming[num_bytes] -= 1
            _changed.notify_all()


def _made(num_bytes: int) -> torch.Tensor:
    memory = _touched(num_bytes)
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0)  # type: ignore[no-untyped-call]
    if int(code) == 0:
        _registered.append(memory)
        return memory
    _forget_error()  # a driver or a sandbox that cannot register: slower
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _touched(num_bytes: int) -> torch.Tensor:
    """Return memory whose pages are there, by calls that do not hold the interpreter's lock."""
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE_BYTES
    touched = torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=start)
    _libc.memset(touched.data_ptr(), 0, num_bytes)
    return touched


def _forget_error() -> None:
    """Let the runtime's last error go, for which the next kernel's launch would be blamed."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
