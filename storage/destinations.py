"""Where a model can be staged on this machine, and which place is best: the arithmetic, in words.

/dev/shm is as fast as memory and is memory: what lies there is taken from the engine, and counts
against the cgroup's limit. So weights go there only when they and the engine's own needs fit; else
to the fastest local disk with room.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from storage.disk_space import free_bytes

Kind = Literal["memory", "nvme", "ssd", "disk", "network"]

CACHE_VARIABLE = "NIGHTJAR_CACHE"
"""Environment variable: folders to stage to, separated by colons, fastest first."""

GB = 1e9
_MARGIN_BYTES = 64 << 20
_DISK_MARGIN_BYTES = 1 << 30
_LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs"}
_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}
_RANK: dict[Kind, int] = {"memory": 0, "nvme": 1, "ssd": 2, "disk": 3, "network": 4}


class Mount(NamedTuple):
    """The file system a path lies on."""

    point: Path
    file_system: str
    device: str  # major:minor


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A folder that models can be staged in."""

    root: Path
    kind: Kind
    free_bytes: int


class HostMemory(NamedTuple):
    """Memory this process may still use, and what sets that limit."""

    available_bytes: int
    limited_by: str


class EngineMemory(NamedTuple):
    """Host memory that the engine will need beside weights in memory."""

    num_bytes: int
    parts: str
    """What for, such as `4.3 GB for the process and its rows`."""

    @classmethod
    def sum_of(cls, parts: Mapping[str, int]) -> "EngineMemory":
        """Add up bytes by what they are for; what needs none is left out."""
        said = [f"{_gb(num_bytes)} for {name}" for name, num_bytes in parts.items() if num_bytes]
        return cls(sum(parts.values()), ", ".join(said))


class Choice(NamedTuple):
    """Where a model goes, and why."""

    destination: Destination | None
    reason: str


def choose(
    num_bytes: int, *, engine: EngineMemory, memory: HostMemory, destinations: list[Destination]
) -> Choice:
    """Pick the fastest destination that the model fits, without starving the engine.

    Args:
        num_bytes: still to be written.
        engine: what it will need besides.
    """
    reasons = []
    for place in sorted(destinations, key=lambda place: _RANK[place.kind]):
        if place.kind == "memory":
            fits, arithmetic = _memory_fits(num_bytes, engine, memory, place)
        else:
            fits = num_bytes + _DISK_MARGIN_BYTES <= place.free_bytes
            sign = "<=" if fits else ">"
            arithmetic = (
                f"weights {_gb(num_bytes)} + {_gb(_DISK_MARGIN_BYTES)} spare {sign} "
                f"{_gb(place.free_bytes)} free on {place.kind} {place.root}"
            )
        reasons.append(arithmetic)
        if fits:
            return Choice(place, "; ".join(reasons))
    return Choice(None, "; ".join(reasons) or "there is no local disk to stage to")


def _memory_fits(
    num_bytes: int, engine: EngineMemory, memory: HostMemory, place: Destination
) -> tuple[bool, str]:
    total = num_bytes + engine.num_bytes
    fits = total <= memory.available_bytes
    arithmetic = (
        f"weights {_gb(num_bytes)} + engine {_gb(engine.num_bytes)} ({engine.parts}) = {_gb(total)} "
        f"{'<=' if fits else '>'} {_gb(memory.available_bytes)} of memory ({memory.limited_by})"
    )
    if not fits:
        return False, arithmetic
    if num_bytes + _MARGIN_BYTES > place.free_bytes:
        return False, f"weights {_gb(num_bytes)} > {_gb(place.free_bytes)} free in {place.root}"
    return True, f"{arithmetic}, and {place.root} has {_gb(place.free_bytes)} free"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.1f} GB" if num_bytes >= GB / 10 else f"{num_bytes / 1e6:.1f} MB"


def find_destinations() -> list[Destination]:
    """Folders on this machine to stage to: what the environment names, else /dev/shm and local disks."""
    if named := os.environ.get(CACHE_VARIABLE):
        return [describe(Path(folder)) for folder in named.split(":") if folder]
    user = f"nightjar-{os.geteuid()}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = [describe(cache / "nightjar")]
    if os.access("/dev/shm", os.W_OK):
        found.append(describe(Path("/dev/shm") / user))
    slowest = _RANK[found[0].kind]
    for mount in read_mounts():
        root = mount.point / user
        is_disk = mount.file_system in _LOCAL_FILE_SYSTEMS and mount.point.is_dir()
        if is_disk and os.access(mount.point, os.W_OK) and _RANK[describe(root).kind] < slowest:
            found.append(describe(root))
    return found


def describe(root: Path) -> Destination:
    """What kind of disk a folder lies on (or would), and how much is free there."""
    existing = root
    while not existing.exists():
        existing = existing.parent
    return Destination(root=root, kind=disk_kind(existing), free_bytes=free_bytes(root))


def disk_kind(path: Path) -> Kind:
    """How fast the disk under an existing path can be expected to be."""
    mount = mount_of(path)
    if mount.file_system in _MEMORY_FILE_SYSTEMS:
        return "memory"
    if mount.file_system == "overlay":
        return "disk"
    if mount.file_system not in _LOCAL_FILE_SYSTEMS:
        return "network"
    try:
        device = (Path("/sys/dev/block") / mount.device).resolve(strict=True)
    except OSError:
        return "disk"
    if device.name.startswith("nvme"):
        return "nvme"
    for folder in (device, device.parent):  # a partition's queue is its disk's
        flag = folder / "queue" / "rotational"
        if flag.exists():
            return "ssd" if flag.read_text().strip() == "0" else "disk"
    return "disk"


def mount_of(path: Path) -> Mount:
    """The mount that a path lies on."""
    resolved = path.resolve()
    inside = [mount for mount in read_mounts() if resolved.is_relative_to(mount.point)]
    return max(inside, key=lambda mount: len(mount.point.parts), default=Mount(Path("/"), "", ""))


def read_mounts(mountinfo: Path = Path("/proc/self/mountinfo")) -> list[Mount]:
    """The mounts this process sees, later ones first where they hide earlier ones."""
    mounts = []
    for line in mountinfo.read_text().splitlines():
        fields, _, after = line.partition(" - ")
        _, _, device, _, point, *_ = fields.split(" ")
        mounts.append(Mount(Path(point.replace("\\040", " ")), after.split(" ")[0], device))
    return mounts[::-1]


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """Memory this process may still use: the machine's, or less where a cgroup (v1 or v2) says so."""
    lines = (proc / "meminfo").read_text().splitlines()
    (available_kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    best = HostMemory(int(available_kib) * 1024, "MemAvailable")
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            best = min([best, *_v2_limits(cgroups, path), *_v2_limits(cgroups / "unified", path)])
        elif "memory" in controllers.split(","):
            best = min([best, *_v1_limits(cgroups / "memory", path)])
    return best


def _v2_limits(root: Path, path: str) -> list[HostMemory]:
    found = []
    for folder in _upwards(root, path):
        limit, usage = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and usage is not None:
            stats = _stats(folder / "memory.stat")
            found.append(_headroom(limit, usage, stats.get("file", 0) - stats.get("shmem", 0)))
    return found


def _v1_limits(root: Path, path: str) -> list[HostMemory]:
    found = []
    for folder in _upwards(root, path):
        limit = _number(folder / "memory.limit_in_bytes")
        usage = _number(folder / "memory.usage_in_bytes")
        if limit is not None and usage is not None and limit < 1 << 60:
            stats = _stats(folder / "memory.stat")
            cached = stats.get("total_cache", 0) - stats.get("total_shmem", 0)
            found.append(_headroom(limit, usage, cached))
    return found


def _headroom(limit: int, usage: int, reclaimable: int) -> HostMemory:
    """The page cache can be dropped when memory is short; what lies in tmpfs cannot."""
    available = max(0, limit - usage + max(0, reclaimable))
    return HostMemory(available, f"cgroup limit {_gb(limit)}")


def _upwards(root: Path, path: str) -> list[Path]:
    """A cgroup's folder and those above it: each one's limit counts."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stats(path: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        return {name: int(value) for name, value in pairs}
    except OSError:
        return {}
