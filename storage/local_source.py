"""Models in a folder of some file system, local or on the network: pinned by size and modification time."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from storage.errors import BadInput, InputChanged, NotFound, StoreUnavailable
from storage.stage_sources import SourceFile
from storage.weight_files import is_read, is_weights

_NUM_SAMPLES = 16
_SAMPLE_BYTES = 64 << 10


class LocalSource:
    """A folder on some file system, or one file."""

    def __init__(self, path: Path) -> None:
        self._folder = path if path.is_dir() else path.parent
        self._only = None if path.is_dir() else path.name
        if not path.exists():
            raise NotFound(
                f"{path}: no such folder; give a model folder, s3://bucket/prefix/, hf://ORG/REPO "
                "or a GGUF file"
            )
        if not path.is_dir() and not path.is_file():
            raise BadInput(f"{path}: neither a folder nor a file; give a model folder")
        self.path = path
        self.uri = str(path)
        self.identity = f"file|{path.resolve()}"

    def list_files(self) -> list[SourceFile]:
        if self._only:
            names = [self._only]
        else:
            names = [name for name in sorted(_walk(self._folder)) if self._is_file(name)]
        return [replace(self._stat(name), fingerprint=self._sample(name)) for name in names]

    def describe(self, files: list[SourceFile]) -> list[SourceFile]:
        return files

    def read(self, file: SourceFile) -> bytes:
        return (self._folder / file.name).read_bytes()

    def open_range(self, file: SourceFile, start: int, end: int) -> "_FileBody":
        self.refuse_change(file)
        return _FileBody(self._folder / file.name, start, end, lambda: self.refuse_change(file))

    def refuse_change(self, file: SourceFile) -> None:
        """Raise InputChanged unless a file still has the size and time it was listed with."""
        if self._stat(file.name).etag != file.etag:
            raise InputChanged(
                f"{self._folder / file.name}: changed while it was copied; stage it again"
            )

    def _is_file(self, name: str) -> bool:
        """Whether a name is a file's, which a link to nothing is not.

        Raises:
            BadInput: it would be read, and is a pipe or a device, or a small file's link that leads outside.
        """
        path = self._folder / name
        try:
            is_regular = stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ELOOP)  # another one is said by `_stat`
        if not is_read(name):
            return is_regular
        if not is_regular:
            raise BadInput(f"{path}: no regular file; remove it, or put the file itself there")
        if path.is_symlink() and not is_weights(name):
            folder = self._folder.resolve()
            # In a Hub cache the files of a snapshot are links to blobs beside it.
            blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
            target = path.resolve()
            if not (target.is_relative_to(folder) or target.is_relative_to(blobs)):
                raise BadInput(
                    f"{path}: a link to {target}, outside the model folder; put the file itself there"
                )
        return True

    def _stat(self, name: str) -> SourceFile:
        try:
            found = (self._folder / name).stat()
        except OSError as error:
            raise InputChanged(f"{self._folder / name}: vanished: {error.strerror}") from error
        return SourceFile(
            name=name, size=found.st_size, etag=f"{found.st_size}-{found.st_mtime_ns}"
        )

    def _sample(self, name: str) -> str:
        """Digest of a file's beginning, end and blocks in between: all of it when it is small."""
        digest = hashlib.sha256()
        with (self._folder / name).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            step = max(_SAMPLE_BYTES, size // _NUM_SAMPLES)
            for offset in (*range(0, size, step), max(0, size - _SAMPLE_BYTES)):
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))
        return digest.hexdigest()


class _FileBody:
    """A range of a file; what was read is good only if the file is still the same at its end."""

    def __init__(self, path: Path, start: int, end: int, refuse_change: Callable[[], None]) -> None:
        self._path = path
        self._refuse_change = refuse_change
        self._left = end - start
        self._stream = path.open("rb", buffering=0)
        self._stream.seek(start)

    def readinto(self, view: memoryview, /) -> int:
        try:
            count = self._stream.readinto(view[: self._left]) or 0
        except OSError as error:  # a network file system's hiccup, or a disk's: tried again
            raise StoreUnavailable(f"{self._path}: {error.strerror}") from error
        self._left -= count
        if self._left == 0:
            self._refuse_change()
        return count

    def close(self) -> None:
        self._stream.close()


def _walk(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            yield (Path(root) / name).relative_to(folder).as_posix()
