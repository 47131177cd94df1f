"""LocalStore: a folder as an object store, durable and safe among processes.

    create-only   write .nj-*, fsync, link to the key, unlink, fsync the folder
    put           write .nj-*, fsync, rename over the key, fsync the folder
    swap          the same under a flock that every replacing write takes for its last step

A reader sees the old object or the new one. What a killed writer leaves behind starts with `.nj-`, is
never listed, and is removed by `sweep`, which takes only what no living process has locked.
"""

import errno
import fcntl
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
from storage.local_files import (
    HIDDEN,
    etag_of,
    flush,
    remove_empty,
    sync_folder,
    temporary,
    walk,
    write,
)
from storage.object_store import ObjectInfo

_LOCK = ".nj-lock"
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
            partial = path.with_name(f".{os.urandom(12).hex()}.partial")
            try:
                with partial.open("wb") as target:
                    shutil.copyfileobj(file, target, 1 << 20)
                    flush(target)
                if etag_of(file) != info.etag:
                    raise PreconditionFailed(f"{self.uri}/{key}: changed while it was copied")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            return info

    def head(self, key: str) -> ObjectInfo:
        with self._open(key) as (_, info):
            return info

    def put(self, key: str, data: bytes) -> ObjectInfo:
        return self._put(key, len(data), lambda file: write(file, data))

    def upload(self, path: Path, key: str) -> ObjectInfo:
        with translate(path), path.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            return self._put(key, size, lambda file: shutil.copyfileobj(source, file, 1 << 20))

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        path = self._path(key)
        with translate(path, len(data)), temporary(path.parent) as (file, hidden):
            write(file, data)
            flush(file)
            failpoint("local_before_link")
            created = self._link(hidden, path)
            failpoint("local_after_link")
        if not created and self.get(key) != data:
            raise AlreadyExists(f"{self.uri}/{key}: other bytes are stored under this key")
        with translate(path):
            # Also for a file another process linked: the caller relies on it from now on.
            sync_folder(path.parent)
        return self.head(key)

    def put_if_match(self, key: str, data: bytes, etag: str) -> ObjectInfo:
        def require() -> None:
            found = self.head(key).etag
            if found != etag:
                raise PreconditionFailed(f"{self.uri}/{key}: ETag is {found}, not {etag}")

        require()
        return self._put(key, len(data), lambda file: write(file, data), require)

    def copy(self, source: str, target: str, *, size: int | None = None) -> ObjectInfo:
        with self._open(source) as (file, info):
            return self._put(target, info.size, lambda out: shutil.copyfileobj(file, out, 1 << 20))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(NotFound), translate(path), self._lock():
            path.unlink()
            sync_folder(path.parent)
            # Leave no empty folders; a writer about to use one makes it anew.
            for folder in path.parents:
                if folder == self._root or not remove_empty(folder):
                    break

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        if ".." in PurePosixPath(folder).parts or prefix.startswith("/"):
            raise ValueError(f"unsafe prefix {prefix!r}: use a relative one without '..' segments")
        with translate(self._root):
            yield from walk(self._root / folder, f"{folder}/" if folder else "", prefix, set())

    def sweep(self) -> int:
        """Remove what killed writers left behind and return how many files that were."""
        removed = 0
        for hidden in self._root.rglob(f"{HIDDEN}*"):
            if hidden.name == _LOCK:
                continue
            with suppress(FileNotFoundError, BlockingIOError), hidden.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                hidden.unlink()
                removed += 1
        return removed

    def can_link(self) -> bool:
        """Whether the file system has hard links, which create-only rests on."""
        with translate(self._root), temporary(self._root) as (_, hidden):
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
        if any(part.startswith(HIDDEN) for part in PurePosixPath(key).parts):
            raise ValueError(f"unsafe object key {key!r}: names starting {HIDDEN!r} are reserved")
        return self._root / key

    @contextmanager
    def _open(self, key: str, if_match: str | None = None) -> Iterator[tuple[BinaryIO, ObjectInfo]]:
        path = self._path(key)
        with translate(path), path.open("rb") as file:
            stat = os.fstat(file.fileno())
            info = ObjectInfo(key, stat.st_size, etag_of(file), stat.st_mtime)
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
        with translate(path, size), temporary(path.parent) as (file, hidden):
            write(file)
            flush(file)
            failpoint("local_before_rename")
            with self._lock():
                require()
                hidden.replace(path)
            failpoint("local_after_rename")
            sync_folder(path.parent)
            stat = os.fstat(file.fileno())
            return ObjectInfo(key, stat.st_size, etag_of(file), stat.st_mtime)

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
