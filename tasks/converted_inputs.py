"""Text input as Parquet in the run folder: put there at planning, fetched once per node."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage import keys
from storage.errors import CorruptObject
from storage.manifest import InputFile, file_digest
from storage.object_store import ObjectStore

InputKey = tuple[str, str]  # key and digest


def keep_converted(path: Path, file_index: int, store: ObjectStore, work_dir: Path) -> InputKey:
    """Put a freshly converted file into the run folder, and keep it here under its digest."""
    digest = file_digest(path)
    key = keys.converted_input(file_index, digest)
    store.upload(path, key)
    path.replace(_local_path(digest, work_dir))
    return key, digest


def fetch_converted(file: InputFile, store: ObjectStore, work_dir: Path) -> Path:
    """Return the local path of a planned file's Parquet form.

    Raises:
        CorruptObject: the stored object is not the one that was planned.
    """
    assert file.read_key is not None
    path = _local_path(str(file.read_etag), work_dir)
    with _locked(path.with_suffix(".lock")):
        if not path.exists():
            fresh = path.with_suffix(".fresh")
            store.download(file.read_key, fresh)
            found = file_digest(fresh)
            if found != file.read_etag:
                fresh.unlink()
                raise CorruptObject(
                    f"{store.uri}/{file.read_key}: is {found}, {file.read_etag} was planned"
                )
            fresh.replace(path)
    return path


def _local_path(digest: str, work_dir: Path) -> Path:
    folder = work_dir / "converted"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{digest.removeprefix('sha256:')[:32]}.parquet"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
