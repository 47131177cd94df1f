"""Who holds a lease: a name that tells, on the same machine, whether its owner is still alive.

`<host>/<boot id>/<pid>/<start ticks>/<random>`: a restarted run need not wait for the lease of the
process that was killed a second ago. Only ever a saving of time; safety needs no lease.
"""

import os
import secrets
import socket
from pathlib import Path
from typing import NamedTuple


class _Owner(NamedTuple):
    host: str
    boot_id: str
    pid: str
    start_ticks: str


def holder_name() -> str:
    """Name this process, uniquely per call."""
    return "/".join((*_this_process(os.getpid()), secrets.token_hex(4)))


def is_dead(holder: str) -> bool:
    """Whether the holder was a process of this machine that no longer runs; False when unknown."""
    parts = holder.split("/")
    if len(parts) != 5:
        return False
    owner = _Owner(*parts[:4])
    if (owner.host, owner.boot_id) != (socket.gethostname(), _boot_id()) or not owner.boot_id:
        return False
    return _start_ticks(owner.pid) != owner.start_ticks


def _this_process(pid: int) -> _Owner:
    return _Owner(socket.gethostname(), _boot_id(), str(pid), _start_ticks(str(pid)))


def _boot_id() -> str:
    # Pods on one node share a boot id, but not a host name or a process table.
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_ticks(pid: str) -> str:
    """Field 22 of /proc/PID/stat: start time in clock ticks since boot; empty when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
