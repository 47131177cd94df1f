"""What a disk can do, measured once per cache: so that a slow stage can be told from a slow disk."""

import json
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

_BLOCK_BYTES = 16 << 20
_NUM_THREADS = 4
_RECORD = "disk_speed.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpeed:
    """Sequential O_DIRECT bandwidth with a few threads, in GB/s."""

    write_gb_per_s: float
    read_gb_per_s: float


def disk_speed(root: Path, *, num_bytes: int = 512 << 20) -> DiskSpeed | None:
    """The speed of the disk under a cache, from its record or measured now (about a second).

    None when it cannot be told: no O_DIRECT there, or no room for the measurement.
    """
    record = root / _RECORD
    try:
        return DiskSpeed(**json.loads(record.read_bytes()))
    except (OSError, ValueError, TypeError):
        pass  # not measured yet, or damaged: measured now
    scratch = root / f".{_RECORD}.{os.getpid()}"
    try:
        speed = _measure(scratch, num_bytes)
    except OSError:
        return None
    finally:
        scratch.unlink(missing_ok=True)
    record.write_text(json.dumps(asdict(speed)))
    return speed


def _measure(scratch: Path, num_bytes: int) -> DiskSpeed:
    block = memoryview(mmap.mmap(-1, _BLOCK_BYTES))
    block[:] = os.urandom(1 << 20) * (_BLOCK_BYTES >> 20)  # disks that compress must not cheat
    fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        offsets = range(0, num_bytes, _BLOCK_BYTES)
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            began = time.perf_counter()
            list(pool.map(lambda offset: os.pwrite(fd, block, offset), offsets))
            os.fsync(fd)
            wrote = time.perf_counter()
            list(pool.map(lambda offset: _read(fd, offset), offsets))
            read = time.perf_counter()
    finally:
        os.close(fd)
    return DiskSpeed(
        write_gb_per_s=round(num_bytes / (wrote - began) / 1e9, 2),
        read_gb_per_s=round(num_bytes / (read - wrote) / 1e9, 2),
    )


def _read(fd: int, offset: int) -> None:
    with mmap.mmap(-1, _BLOCK_BYTES) as buffer:
        os.preadv(fd, [buffer], offset)
