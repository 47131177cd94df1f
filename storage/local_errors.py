"""Operating system errors as storage errors."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import AccessDenied, NoSpace, NotFound, StorageError, StoreUnavailable

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_IMPOSSIBLE = {errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.EINVAL, errno.ELOOP}


@contextmanager
def translate(path: Path, size: int | None = None) -> Iterator[None]:
    """Raise storage errors for whatever the operating system says while `path` is worked on.

    Args:
        size: Bytes about to be written, for the message when there is no room.
    """
    try:
        yield
    except OSError as error:
        raise _translated(error, path, size) from error


def _translated(error: OSError, path: Path, size: int | None) -> StorageError:
    reason = error.strerror or str(error)
    if error.errno in _NO_SPACE:
        needed = "some" if size is None else str(size)
        return NoSpace(f"{path}: needed {needed} bytes, free {_free(path)}; make room, run again")
    if error.errno in _DENIED:
        return AccessDenied(f"{path}: {reason}; check its owner and mode")
    if error.errno == errno.ENOTDIR:
        return NotFound(f"{path}: {_file_above(path)} is a file, not a folder; give another place")
    if error.errno == errno.ENOENT:
        return NotFound(f"{path}: no such file")
    if error.errno in _IMPOSSIBLE:
        return StorageError(
            f"{path}: {reason}; the key and the folder's content do not go together"
        )
    return StoreUnavailable(f"{path}: {reason}; check the disk or the mount, then run again")


def _file_above(path: Path) -> Path:
    return next((above for above in path.parents if above.is_file()), path.parent)


def _free(path: Path) -> int:
    for folder in path.parents:
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return 0
