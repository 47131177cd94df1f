"""LocalStore: a folder as an object store, durable and safe among processes.

    create-only   write .nj-*, fsync, link to the key, unlink, fsync the folder
    put           write .nj-*, fsync, rename over the key, fsync the folder
    swap          the same under a flock that every replacing write takes for its last step

A reader sees the old object or the new one. What a killed writer leaves behind starts with `.nj-`, is
never listed, and is removed by `sweep`, which takes only what no living process has locked.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from storage import keys
from storage.errors import AlreadyExists, NotFound, PreconditionFailed, StoreUnfit
from storage.failpoints import failpoint
from storage.local_errors import translate
from storage.object_store import ObjectInfo

_HIDDEN = ".nj-"
_LOCK = ".nj-lock"
_DIGEST_LIMIT = 8 << 20  # bytes; up to here an ETag is a digest of the content
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}


class LocalStore:
    """Objects as files under `root`, which is made when first written to.

    ETags: of an object up to 8 MiB its digest, of a larger one its size, times, and inode, where the
    change time makes sure that bytes rewritten in place under an old modification time are
    noticed. So touching the metadata of a large file counts as a change; missing one never happens.

    `allow_single_writer` permits file systems without hard links, where create-only is then
    a check followed by a rename.
    """

    def __init__(self, root: Path | str, *, allow_single_writer: bool = False) -> None:
        self._root = Path(os.path.abspath(root))
        self._allow_single_writer = allow_single_writer

    @property
    def uri(self) -> str:
        return str(self._root)

    def get(self, key: str) -> bytes:
        with self._open(key) as (file, _):
            return file.read()

    def get_range(self, key: str, start: int, end: int, *, if_match: str | None = None) -> bytes:
        if not 0 <= start <= end:
            raise ValueError(f"range [{start}, {end}) of {key}: need 0 <= start <= end")
        with self._open(key, if_match) as (file, _):
            file.seek(start)
            return file.read(end - start)

    def download(self, key: str, path: Path, *, if_match: str | None = None) -> ObjectInfo:
        with self._open(key, if_match) as (file, info), translate(path, info.size):
            partial = path.with_name(f"{_HIDDEN}{os.urandom(6).hex()}-{path.name}"[:200])
            try:
                with partial.open("wb") as target:
                    shutil.copyfileobj(file, target, 1 << 20)
                    _flush(target)
                if _etag(file) != info.etag:
                    raise PreconditionFailed(f"{self.uri}/{key}: changed while it was copied")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            return info

    def head(self, key: str) -> ObjectInfo:
        with self._open(key) as (_, info):
            return info

    def put(self, key: str, data: bytes) -> ObjectInfo:
        return self._put(key, len(data), lambda file: _write(file, data))

    def upload(self, path: Path, key: str) -> ObjectInfo:
        with translate(path), path.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            return self._put(key, size, lambda file: shutil.copyfileobj(source, file, 1 << 20))

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        path = self._path(key)
        with translate(path, len(data)), _temporary(path.parent) as (file, hidden):
            _write(file, data)
            _flush(file)
            failpoint("local_before_link")
            created = self._link(hidden, path)
            failpoint("local_after_link")
        if not created and self.get(key) != data:
            raise AlreadyExists(f"{self.uri}/{key}: other bytes are stored under this key")
        with translate(path):
            # Also for a file another process linked: the caller relies on it from now on.
            _sync_folder(path.parent)
        return self.head(key)

    def put_if_match(self, key: str, data: bytes, etag: str) -> ObjectInfo:
        def require() -> None:
            found = self.head(key).etag
            if found != etag:
                raise PreconditionFailed(f"{self.uri}/{key}: ETag is {found}, not {etag}")

        require()
        return self._put(key, len(data), lambda file: _write(file, data), require)

    def copy(self, source: str, target: str) -> ObjectInfo:
        with self._open(source) as (file, info):
            return self._put(target, info.size, lambda out: shutil.copyfileobj(file, out, 1 << 20))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(NotFound), translate(path), self._lock():
            path.unlink()
            _sync_folder(path.parent)
            # Leave no empty folders; a writer about to use one makes it anew.
            for folder in path.parents:
                if folder == self._root or not _remove_empty(folder):
                    break

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        if ".." in PurePosixPath(folder).parts or prefix.startswith("/"):
            raise ValueError(f"unsafe prefix {prefix!r}: use a relative one without '..' segments")
        with translate(self._root):
            yield from _walk(self._root / folder, f"{folder}/" if folder else "", prefix, set())

    def sweep(self) -> int:
        """Remove what killed writers left behind and return how many files that were."""
        removed = 0
        for hidden in self._root.rglob(f"{_HIDDEN}*"):
            if hidden.name == _LOCK:
                continue
            with suppress(FileNotFoundError, BlockingIOError), hidden.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                hidden.unlink()
                removed += 1
        return removed

    def can_link(self) -> bool:
        """Whether the file system has hard links, which create-only rests on."""
        with translate(self._root), _temporary(self._root) as (_, hidden):
            target = hidden.with_name(f"{hidden.name}-link")
            try:
                os.link(hidden, target)
            except OSError as error:
                if error.errno in _NO_LINKS:
                    return False
                raise
            target.unlink()
            return True

    def _path(self, key: str) -> Path:
        if str(PurePosixPath(keys.check(key))) != key:
            raise ValueError(
                f"unsafe object key {key!r}: a folder cannot hold '.' or empty segments"
            )
        if any(part.startswith(_HIDDEN) for part in PurePosixPath(key).parts):
            raise ValueError(f"unsafe object key {key!r}: names starting {_HIDDEN!r} are reserved")
        return self._root / key

    @contextmanager
    def _open(self, key: str, if_match: str | None = None) -> Iterator[tuple[BinaryIO, ObjectInfo]]:
        path = self._path(key)
        with translate(path), path.open("rb") as file:
            stat = os.fstat(file.fileno())
            info = ObjectInfo(key, stat.st_size, _etag(file), stat.st_mtime)
            if if_match is not None and info.etag != if_match:
                raise PreconditionFailed(f"{self.uri}/{key}: ETag is {info.etag}, not {if_match}")
            yield file, info

    def _put(
        self,
        key: str,
        size: int,
        write: Callable[[BinaryIO], None],
        require: Callable[[], None] = lambda: None,
    ) -> ObjectInfo:
        path = self._path(key)
        with translate(path, size), _temporary(path.parent) as (file, hidden):
            write(file)
            _flush(file)
            failpoint("local_before_rename")
            with self._lock():
                require()
                hidden.replace(path)
            failpoint("local_after_rename")
            _sync_folder(path.parent)
            stat = os.fstat(file.fileno())
            return ObjectInfo(key, stat.st_size, _etag(file), stat.st_mtime)

    def _link(self, hidden: Path, path: Path) -> bool:
        """Give the file its name; False when the name is taken."""
        try:
            os.link(hidden, path)
        except FileExistsError:
            # On NFS a link whose reply got lost is repeated, and then finds itself.
            return hidden.stat().st_nlink == 2
        except OSError as error:
            if hidden.stat().st_nlink == 2:
                return True
            if error.errno not in _NO_LINKS:
                raise
            return self._link_without_links(hidden, path)
        return True

    def _link_without_links(self, hidden: Path, path: Path) -> bool:
        if not self._allow_single_writer:
            raise StoreUnfit(
                f"{self._root}: the file system has no hard links, so exactly-once cannot be kept; "
                "use another folder, or storage.allow_single_writer for one replica"
            )
        with self._lock():
            if path.exists():
                return False
            hidden.rename(path)
            return True

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / _LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new hidden file, open and locked, and gone afterwards unless it was renamed."""
    hidden = folder / f"{_HIDDEN}{os.urandom(12).hex()}"
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


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def _etag(file: BinaryIO) -> str:
    """Name the bytes behind an open file; leaves the position at the start."""
    stat = os.fstat(file.fileno())
    file.seek(0)
    if stat.st_size > _DIGEST_LIMIT:
        return f"{stat.st_size:x}-{stat.st_mtime_ns:x}-{stat.st_ctime_ns:x}-{stat.st_ino:x}"
    digest = hashlib.sha256(file.read()).hexdigest()[:32]
    file.seek(0)
    return digest


def _walk(
    folder: Path, base: str, prefix: str, above: set[tuple[int, int]]
) -> Iterator[ObjectInfo]:
    """Yield in byte order: a folder sorts as its name with the slash."""
    try:
        stat = folder.stat()
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(_HIDDEN)]
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
            yield from _walk(folder / name, key, prefix, above | {identity})
        else:
            yield from _file(folder / name, key)


def _file(path: Path, key: str) -> Iterator[ObjectInfo]:
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            info = ObjectInfo(key, stat.st_size, _etag(file), stat.st_mtime)
    except FileNotFoundError:
        if path.is_symlink():
            raise NotFound(f"{path}: a symbolic link to nothing; remove it or mend it") from None
        return  # deleted since the folder was read
    yield info
