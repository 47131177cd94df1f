"""Huge pages under files in memory: what lies in /dev/shm is written and read with fewer, larger pages.

tmpfs gives out small pages unless it is mounted with huge=, which /dev/shm seldom is, and every one of them
costs an allocation, a look-up and a copy of its own. Linux 6.1 and later make huge ones when asked, whatever the mount
says (madvise, MADV_COLLAPSE). That is cheap only before the small ones are there: so one byte is written to
each huge page's place in an empty file, and the kernel is asked for the rest.

A matter of speed alone: what cannot be had so is left to the ordinary allocation.
"""

import ctypes
import mmap
import os
import time
from contextlib import suppress
from pathlib import Path

_TMPFS_MAGIC = 0x01021994
_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value
_SIZE_PATH = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_STEP_BYTES = 8 << 20
MOST_S_PER_BYTE = 0.5e-9
"""Of a thread's processor: about what small pages cost to make and to read once. Huge ones cost a seventh of it; but
four times as much where a virtual machine has not been given the memory yet, or the kernel must first make room."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class HugePages:
    """For the files of one copy; given up for all of them once they cost too much. Any thread may use it."""

    def __init__(self, *, most_s_per_byte: float = MOST_S_PER_BYTE) -> None:
        self._most_s_per_byte = most_s_per_byte
        self._page_bytes = _huge_page_bytes()
        self._are_cheap = self._page_bytes > 0

    def reserve(self, fd: int, num_bytes: int) -> int:
        """Make an empty file in memory `num_bytes` long, on huge pages as far as they can be had.

        `fd` is open for reading and writing. The file reads as zeros. Nothing is done to a file that is not
        empty, not in memory, or smaller than a huge page; nor where the system has none.

        Returns:
            How many bytes lie on huge pages.
        """
        if not self._are_cheap or num_bytes < self._page_bytes:
            return 0
        if os.fstat(fd).st_size or not _is_in_memory(fd):
            return 0
        done, end = 0, num_bytes // self._page_bytes * self._page_bytes
        with suppress(OSError):  # a full disk, or memory's limit, is said by who allocates the rest
            os.ftruncate(fd, num_bytes)
            while self._are_cheap and done < end:
                size = min(end - done, max(self._page_bytes, _STEP_BYTES))
                began_s = time.thread_time()
                for offset in range(done, done + size, self._page_bytes):
                    os.pwrite(fd, b"\0", offset)
                if not _collapse(fd, done, size, self._page_bytes):
                    break
                done += size
                cost_s = time.thread_time() - began_s
                self._are_cheap = self._are_cheap and cost_s <= size * self._most_s_per_byte
        return done


def _huge_page_bytes() -> int:
    try:
        return int(_SIZE_PATH.read_text())
    except (OSError, ValueError):  # this system has none
        return 0


def _is_in_memory(fd: int) -> bool:
    found = ctypes.create_string_buffer(512)  # struct statfs, whose first field is f_type
    if _libc.fstatfs(fd, found):
        return False
    return ctypes.c_long.from_buffer(found).value == _TMPFS_MAGIC


def _collapse(fd: int, offset: int, size: int, page_bytes: int) -> bool:
    """Put part of a file on huge pages, if they can be had: through a mapping as aligned as they are."""
    room = size + page_bytes
    anywhere = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    held = _libc.mmap(None, room, 0, anywhere, -1, 0)
    if held == _FAILED:
        return False
    try:
        aligned = -(-held // page_bytes) * page_bytes
        mode = mmap.MAP_SHARED | _MAP_FIXED
        if _libc.mmap(aligned, size, mmap.PROT_READ, mode, fd, offset) != aligned:
            return False
        return bool(_libc.madvise(aligned, size, _MADV_COLLAPSE) == 0)
    finally:
        _libc.munmap(held, room)
