"""Files under LocalStore: hidden ones that become objects, durable folders, ETags, the ordered walk."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from storage.errors import NotFound
from storage.object_store import ObjectInfo

HIDDEN = ".nj-"
_DIGEST_LIMIT = 8 << 20  # bytes; up to here an ETag is a digest of the content


@contextmanager
def temporary(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new hidden file, open and locked, and gone afterwards unless it was renamed."""
    hidden = folder / f"{HIDDEN}{os.urandom(12).hex()}"
    with _create(hidden) as file:
        try:
            yield file, hidden
        finally:
            hidden.unlink(missing_ok=True)


def _create(path: Path, tries: int = 16) -> BinaryIO:
    while True:
        tries -= 1
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("x+b")
        except FileNotFoundError:
            # Somebody who deleted the last object took the empty folder away just now.
            if not tries:
                raise
            continue
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink or not tries:
            return file
        file.close()  # swept before it was locked


def write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def etag_of(file: BinaryIO) -> str:
    """Name the bytes behind an open file; leaves the position at the start."""
    stat = os.fstat(file.fileno())
    file.seek(0)
    if stat.st_size > _DIGEST_LIMIT:
        return f"{stat.st_size:x}-{stat.st_mtime_ns:x}-{stat.st_ctime_ns:x}-{stat.st_ino:x}"
    digest = hashlib.sha256(file.read()).hexdigest()[:32]
    file.seek(0)
    return digest


def walk(folder: Path, base: str, prefix: str, above: set[tuple[int, int]]) -> Iterator[ObjectInfo]:
    """Yield in byte order: a folder sorts as its name with the slash."""
    try:
        stat = folder.stat()
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(HIDDEN)]
    except (FileNotFoundError, NotADirectoryError):
        return
    identity = (stat.st_dev, stat.st_ino)
    if identity in above:
        return  # a symbolic link to a folder above
    names = sorted((e.name + "/" if e.is_dir() else e.name for e in entries), key=os.fsencode)
    for name in names:
        key = base + name
        if not key.startswith(prefix) and not (name.endswith("/") and prefix.startswith(key)):
            continue
        if name.endswith("/"):
            yield from walk(folder / name, key, prefix, above | {identity})
        else:
            yield from _file(folder / name, key)


def _file(path: Path, key: str) -> Iterator[ObjectInfo]:
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            info = ObjectInfo(key, stat.st_size, etag_of(file), stat.st_mtime)
    except FileNotFoundError:
        if path.is_symlink():
            raise NotFound(f"{path}: a symbolic link to nothing; remove it or mend it") from None
        return  # deleted since the folder was read
    yield info
