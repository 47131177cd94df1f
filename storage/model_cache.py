"""A folder of staged models on one disk: who reads which, which are whole, and how one goes.

    <root>/models/<content_id>/MANIFEST.json   written last: the model is whole
    <root>/models/<content_id>/...             its files, and partials while it is being staged
    <root>/locks/<content_id>.use              LOCK_SH by readers and stagers, LOCK_EX by who deletes
    <root>/locks/<content_id>.stage            LOCK_EX by the one process that moves the bytes; names it
    <root>/locks/<content_id>.ready            LOCK_EX by it while what has a weight file's name is verified
    <root>/locks/space                         LOCK_EX while room is made and reserved
    <root>/pins/<content_id>                   never evicted
    <root>/sources/<digest>.json               which commit a moving source was resolved to

Locks are flocks: the kernel drops them when their process dies, however it dies. Lock files stay.
"""

import fcntl
import os
import secrets
import shutil
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from storage.disk_space import NO_SPACE, no_space, used_bytes
from storage.errors import AccessDenied, CorruptObject
from storage.file_lock import FileLock, take_lock
from storage.model_manifest import ModelManifest
from storage.weight_files import MANIFEST

TRASH_PREFIX = ".trash-"
"""Of folders that are being deleted."""


class CacheEntry(NamedTuple):
    """One model in a cache, whole or not."""

    path: Path
    content_id: str
    source: str
    """Empty while it is not whole."""

    num_bytes: int
    """Blocks on disk, reserved ones included."""

    last_used_at: float
    is_whole: bool
    is_pinned: bool
    is_in_use: bool

    @property
    def is_idle(self) -> bool:
        """Whether it may be evicted."""
        return not (self.is_pinned or self.is_in_use)


class Eviction(NamedTuple):
    """What became of a wish to evict."""

    content_id: str
    freed_bytes: int
    kept_because: str
    """Empty when it is gone."""


class Stager(NamedTuple):
    """The process that stages a model."""

    pid: int
    began_at: float
    """Seconds since 1970."""

    host: str


class ModelCache:
    """The staged models below one root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models = root / "models"
        self.sources = root / "sources"
        self._locks = root / "locks"
        self._pins = root / "pins"

    def prepare(self) -> None:
        """Create the folders, for this user only.

        Raises:
            AccessDenied: the root belongs to somebody else, is a link, or others may write in it.
        """
        try:
            for folder in (self.root, self.models, self.sources, self._locks, self._pins):
                folder.mkdir(mode=0o700, parents=folder == self.root, exist_ok=True)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise no_space(self.root, 0) from error
            raise AccessDenied(f"{self.root}: cannot stage here: {error.strerror}") from error
        found = self.root.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise AccessDenied(
                f"{self.root}: must be a folder of user {os.geteuid()} that nobody else can write in; "
                "remove it or stage to another folder"
            )

    def path(self, content_id: str) -> Path:
        """Where a model is, or would be."""
        return self.models / content_id

    def manifest(self, content_id: str) -> ModelManifest | None:
        """The manifest of a whole model; None if it is not whole or its files were touched since."""
        folder = self.path(content_id)
        try:
            data = (folder / MANIFEST).read_bytes()
            manifest = ModelManifest.from_json(data, source=str(folder / MANIFEST))
        except (FileNotFoundError, NotADirectoryError, CorruptObject):
            return None
        return manifest if manifest.is_untouched(folder) else None

    def use(self, content_id: str) -> FileLock:
        """Keep a model from being evicted; marks it as used now."""
        lock = self._lock(f"{content_id}.use", fcntl.LOCK_SH)
        os.utime(self._locks / f"{content_id}.use")
        return lock

    def stage(self, content_id: str) -> FileLock | None:
        """Become the one process that stages this model; None while another is at it."""
        try:
            lock = self._lock(f"{content_id}.stage", fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        lock.write(f"{os.getpid()} {time.time():.0f} {socket.gethostname()}")
        return lock

    def stager(self, content_id: str) -> Stager | None:
        """Who stages this model, where `stage` said that another process does; None if it left no word."""
        try:
            pid, began_at, host = (self._locks / f"{content_id}.stage").read_text().split()
            return Stager(int(pid), float(began_at), host)
        except (OSError, ValueError):
            return None

    def tell_ready(self, content_id: str) -> FileLock:
        """Say, while the lock is held, that small files are here and weight files get their names once verified."""
        return self._lock(f"{content_id}.ready", fcntl.LOCK_EX)

    def is_ready(self, content_id: str) -> bool:
        """Whether the process that stages this model says so."""
        try:
            self._lock(f"{content_id}.ready", fcntl.LOCK_SH | fcntl.LOCK_NB).close()
        except BlockingIOError:
            return True
        return False

    def reserve(self) -> FileLock:
        """Become the one process that makes room; held only until the room is reserved."""
        return self._lock("space", fcntl.LOCK_EX)

    def is_pinned(self, content_id: str) -> bool:
        return (self._pins / content_id).exists()

    def pin(self, content_id: str, pinned: bool = True) -> None:
        """Keep a model whatever the budget; `pinned=False` lets go of it again."""
        if pinned:
            (self._pins / content_id).touch(mode=0o600)
        else:
            (self._pins / content_id).unlink(missing_ok=True)

    def entries(self) -> list[CacheEntry]:
        """Every model in the cache, least recently used first."""
        if not self.models.is_dir():
            return []
        folders = [path for path in self.models.iterdir() if not path.name.startswith(".")]
        return sorted(map(self._entry, folders), key=lambda entry: entry.last_used_at)

    def bytes_on_disk(self) -> int:
        """Bytes that all models take on disk."""
        return used_bytes(self.models)

    def evictable_bytes(self) -> int:
        """Bytes of models that nobody uses and that are not pinned."""
        return sum(entry.num_bytes for entry in self.entries() if entry.is_idle)

    def discard(self, content_id: str) -> None:
        """Delete a model that could not be staged, unless another process is at it."""
        if self.manifest(content_id) is None:
            self.evict(content_id, even_pinned=True)

    def evict(self, content_id: str, *, even_pinned: bool = False) -> Eviction:
        """Delete a model unless somebody reads or stages it, or it is pinned."""
        if self.is_pinned(content_id) and not even_pinned:
            return Eviction(content_id, 0, "it is pinned")
        lock = self._try_lock(content_id)
        if lock is None:
            return Eviction(content_id, 0, "a process is using it")
        with lock:
            num_bytes = used_bytes(self.path(content_id))
            # Renamed first: whoever dies here leaves trash, never a model with files missing.
            trash = self.models / f"{TRASH_PREFIX}{content_id}-{secrets.token_hex(4)}"
            try:
                self.path(content_id).rename(trash)
            except FileNotFoundError:
                return Eviction(content_id, 0, "it is not there")
            _remove(trash)
        (self._pins / content_id).unlink(missing_ok=True)
        return Eviction(content_id, num_bytes, "")

    def _entry(self, folder: Path) -> CacheEntry:
        manifest = self.manifest(folder.name)
        lock = self._try_lock(folder.name)
        if lock:
            lock.close()
        try:
            last_used_at = (self._locks / f"{folder.name}.use").stat().st_mtime
        except FileNotFoundError:
            last_used_at = folder.stat().st_mtime if folder.exists() else 0.0
        return CacheEntry(
            path=folder,
            content_id=folder.name,
            source=manifest.source if manifest else "",
            num_bytes=used_bytes(folder),
            last_used_at=last_used_at,
            is_whole=manifest is not None,
            is_pinned=self.is_pinned(folder.name),
            is_in_use=lock is None,
        )

    def _try_lock(self, content_id: str) -> FileLock | None:
        try:
            return self._lock(f"{content_id}.use", fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None

    def _lock(self, name: str, operation: int) -> FileLock:
        return take_lock(self._locks / name, operation)


def _remove(folder: Path) -> None:
    """Delete a folder, even while another process deletes it too."""
    while folder.exists():
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)


def use_entry(folder: Path) -> FileLock | None:
    """Keep a folder from being evicted where it is a model of a cache; None where it is not."""
    folder = folder.resolve()
    cache = ModelCache(folder.parent.parent)
    if cache.path(folder.name) != folder or not (folder / MANIFEST).exists():
        return None
    try:
        return cache.use(folder.name)
    except OSError:  # no cache after all, or one that this user may only read
        return None
