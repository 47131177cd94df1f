"""A run on a disk that is full, again and again: real ENOSPC on a small tmpfs that grows a little each time."""

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.object_store import StorageConfig, open_store
from tests.faults.forked import Forks
from tests.faults.store_checks import Watcher, check_run

# A start that finds the disk full leaves two or three claims and a note, 4 KiB each, and takes its part
# back; one that is killed leaves its part too, but only every third may be. So most of each step is left to
# go on with. Had parts been left as well, a start in vain would take all of it: 24 KiB.
_FIRST_KIB, _STEP_KIB = 96, 24
_KILL_AT = (
    "after_claim",
    "after_data",
    "before_commit",
    "after_commit",
    "after_copy",
    "after_delete",
)
_MAX_FULL = 200


@contextmanager
def small_disk(folder: Path, kib: int = _FIRST_KIB) -> Iterator[Path | None]:
    """Mount one; None where that is not allowed."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(
    forks: Forks, disk: Path, job: Path, num_rows: int, *, seed: int, step_kib: int = _STEP_KIB
) -> tuple[int, int, list[str]]:
    """Run a job whose results go to `disk` until it is published.

    Returns:
        How often the disk was full, how many processes were killed, and what was wrong.
    """
    rng = random.Random(seed)
    num_full = num_killed = num_started = 0
    size, wrong = os.statvfs(disk).f_blocks * os.statvfs(disk).f_frsize >> 10, list[str]()
    watcher: Watcher | None = None
    while num_full < _MAX_FULL:
        armed = f"{rng.choice(_KILL_AT)}:kill:0.3:{rng.randrange(1 << 30)}"
        failpoint = armed if num_started % 3 == 0 else ""
        child = forks.call(["run", str(job), "--json"], failpoint=failpoint)
        num_started += 1
        if watcher is None and (plans := list(disk.glob("*/plan.json"))):
            watcher = Watcher(open_store(str(plans[0].parent), StorageConfig()), 1.0)
        if watcher is not None:
            watcher.look()
        if child.status == 0:
            break
        if child.status == -signal.SIGKILL:
            num_killed += 1
            continue
        if child.status not in (2, 3) or "needed" not in child.said_whole():
            wrong.append(f"full disk: exit {child.status}: {child.said()}")
            break
        num_full += 1
        size += step_kib
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
    if watcher is None or child.status != 0:
        return num_full, num_killed, [*wrong, "full disk: never published"]
    watcher.look_at_everything()
    (run,) = (path.parent for path in disk.glob("*/plan.json"))
    found, _ = check_run(open_store(str(run), StorageConfig()), num_rows)
    return num_full, num_killed, [*wrong, *watcher.wrong, *found]
