"""How much room a disk has, and what is said when it is too little."""

import errno
import os
from pathlib import Path

from storage.errors import NoSpace

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when a disk, or a user's share of it, is full."""


def free_bytes(folder: Path) -> int:
    """What an ordinary user may still write on the disk under a folder, whether that exists or not."""
    while not folder.exists():
        folder = folder.parent
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def used_bytes(folder: Path) -> int:
    """Blocks that a folder's files take, reserved ones included; 0 without a folder."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # renamed or deleted while we looked
    return total


def no_space(folder: Path, needed_bytes: int, *, limit: str = "") -> NoSpace:
    """The error for a folder that cannot take so many bytes more; `limit` adds another one than the disk's."""
    return NoSpace(
        f"{folder}: {needed_bytes} bytes needed, {free_bytes(folder)} free{limit}; "
        "make room or stage to another folder"
    )
