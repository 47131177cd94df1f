"""Where weights live that the device does not hold: `engine.offload`, for the transformers and zero backends.

    none   on the device, or refused
    cpu    in host memory
    nvme   in files under engine.nvme_path
    auto   transformers: what the device does not hold is in host memory
           zero: in host memory if it holds all weights, else on NVMe

Weights travel to the device before they are used, so the place changes no token.
"""

import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from inference.config import EngineConfig
from inference.errors import EngineConfigError

Place = Literal["none", "cpu", "nvme"]

HOST_MEMORY_SHARE = 0.85
"""Of the host memory that is free, what weights may take; the rest is the engine's and the rows'."""


class Room(NamedTuple):
    """Bytes that are free."""

    host: int
    disk: int


def check_offload(config: EngineConfig, backend: str, *, is_here: bool = True) -> None:
    """Refuse what the backend cannot do, before anything is loaded; `is_here`: on this machine.

    Raises:
        EngineConfigError: with the remedy.
    """
    if config.offload in ("cpu", "nvme") and backend == "paged":
        raise EngineConfigError(
            f"engine.offload is {config.offload}: the paged backend keeps its weights on the device; "
            f"use auto, or engine.backend zero"
        )
    if config.offload == "nvme":
        if config.nvme_path is None:
            raise EngineConfigError(
                "engine.offload is nvme: engine.nvme_path is not set; name a folder on a local NVMe disk"
            )
        if is_here and not Path(config.nvme_path).is_dir():
            raise EngineConfigError(
                f"engine.nvme_path is {config.nvme_path}: no such folder; make it, or name another"
            )


def resolve_place(config: EngineConfig, weight_bytes: int, room: Room | None = None) -> Place:
    """Return where the zero backend keeps `weight_bytes` of weights on this machine.

    Raises:
        EngineConfigError: they fit nowhere; with the arithmetic.
    """
    if config.offload == "none":
        return "none"
    room = room or free_room(config)
    host = int(HOST_MEMORY_SHARE * room.host)
    if config.offload in ("auto", "cpu") and weight_bytes <= host:
        return "cpu"
    is_disk_allowed = config.offload in ("auto", "nvme") and config.nvme_path is not None
    if is_disk_allowed and weight_bytes <= room.disk:
        return "nvme"
    need = f"engine.offload is {config.offload}: {weight_bytes / 1e9:.1f} GB of weights"
    if config.offload == "nvme" or (is_disk_allowed and config.offload == "auto"):
        raise EngineConfigError(
            f"{need}, {room.disk / 1e9:.1f} GB free in {config.nvme_path}; use a larger disk, or more "
            f"host memory with engine.offload cpu"
        )
    raise EngineConfigError(
        f"{need}, {room.host / 1e9:.1f} GB of host memory free, of which {HOST_MEMORY_SHARE:.0%} may be "
        f"used; use a larger machine, or engine.offload nvme with engine.nvme_path"
    )


def free_room(config: EngineConfig) -> Room:
    """Return what is free on this machine; no disk without `engine.nvme_path`."""
    disk = shutil.disk_usage(config.nvme_path).free if config.nvme_path else 0
    return Room(host=free_host_bytes(), disk=disk)


def free_host_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory this process may still use: the machine's, or its container's if that is less."""
    lines = (proc / "meminfo").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    free = int(kib) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except OSError:  # not in a container of its own, or an older kernel
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))
