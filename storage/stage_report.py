"""What staging a model did, and where its time went."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """One staging, in numbers."""

    source: str
    """As resolved: a moving revision is pinned to its commit."""

    content_id: str
    path: str
    outcome: Literal["staged", "hit", "in place"]
    reason: str
    """Why the model is where it is, with the arithmetic."""

    disk: str
    """Kind of disk under `path`: memory, nvme, ssd, disk or network."""

    num_files: int
    num_bytes: int
    bytes_moved: int
    bytes_resumed: int
    """Found on disk from an earlier try, and checked again."""

    huge_bytes: int
    """Reserved in memory on huge pages, from which loading is faster."""

    seconds: float
    cpu_s: float
    """Processor seconds of this process meanwhile."""

    phases: dict[str, float]
    """Seconds by phase: resolve, list, wait, describe, resume, allocate, transfer, publish, check."""

    thread_s: dict[str, float]
    """Seconds summed over the copying threads: read, checksum, write."""

    num_retries: int
    wire_gb_per_s: float | None
    """What the fastest network link can do; None for local sources or when unknown."""

    disk_write_gb_per_s: float | None
    """What the disk was measured to write; None for memory or when not measured."""

    disk_read_gb_per_s: float | None
    """What the disk was measured to read; None for memory or when not measured."""

    verified_by: dict[str, int]
    """Files by who vouched for their bytes; "" counts those that nobody vouched for."""

    skipped: list[str]
    evicted: list[str]

    @property
    def gb_per_s(self) -> float:
        """Bytes moved per second of the transfer, in GB/s; 0 when nothing was moved."""
        transfer_s = self.phases.get("transfer", 0.0)
        return self.bytes_moved / transfer_s / 1e9 if self.bytes_moved and transfer_s else 0.0


@dataclass(slots=True)
class PhaseTimer:
    """Wall and processor seconds since it was made, and the named phases in between."""

    phases: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)
    _cpu_began: float = field(default_factory=time.process_time)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - began

    def totals(self) -> dict[str, Any]:
        """The report's fields that say how long it took."""
        return {
            "seconds": time.perf_counter() - self._began,
            "cpu_s": time.process_time() - self._cpu_began,
            "phases": {name: round(seconds, 4) for name, seconds in self.phases.items()},
        }


def wire_gb_per_s(network: str = "/sys/class/net") -> float | None:
    """Nominal speed of the fastest network link that is up; None when no link says."""
    speeds = []
    for link in os.listdir(network) if os.path.isdir(network) else []:
        try:
            with open(f"{network}/{link}/speed", encoding="ascii") as file:
                speeds.append(int(file.read()))
        except (OSError, ValueError):  # down, or a link without a speed, such as loopback
            continue
    best_mbit = max(speeds, default=0)
    return best_mbit / 8000 if best_mbit > 0 else None
