"""Input files: what `input.uri` names, in a fixed order, and each one as a local file.

Names with a leading `_` or `.` (`_SUCCESS`, `_temporary/`, `.crc` files) are skipped in folders and
globs; a folder is walked to any depth. Files sort by key within each entry of a list. Whatever is left
must be input: a file of unknown kind is refused, never skipped.

An ETag changes whenever the bytes do. Local files are named by content digest, because size and
modification time can stay the same under other bytes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from storage import formats, keys
from storage.errors import BadInput, InputChanged, NotFound, PreconditionFailed
from storage.globs import has_wildcard, literal_prefix, matches
from storage.hub_inputs import HUB_SCHEME, HubInputs
from storage.object_store import ObjectInfo, ObjectStore, StorageConfig, open_store

_SPLITS = "dataset_dict.json"
_STATE = "state.json"
_REMOTE = ("s3://", "memory://")


class SourceFile(NamedTuple):
    """One input file as it is now."""

    uri: str
    size: int
    etag: str


class InputFiles:
    """Expands input URIs and brings files to this machine, checking each against its ETag.

    Remote files lie under `work_dir/inputs`, shared by all processes of the node.
    """

    def __init__(
        self,
        work_dir: Path,
        config: StorageConfig,
        *,
        open_store: Callable[[str, StorageConfig], ObjectStore] = open_store,
        hub: HubInputs | None = None,
    ) -> None:
        self._folder = work_dir / "inputs"
        self._config = config
        self._open_store = open_store
        self._hub = hub or HubInputs(work_dir / "hub")
        self._stores: dict[str, ObjectStore] = {}
        self._digests: dict[tuple[Any, ...], str] = {}

    def expand(self, uri: str | list[str]) -> list[SourceFile]:
        """Return the files an `input.uri` names, in order.

        Raises:
            BadInput: nothing is there, a file is named twice, or one is of unknown kind.
        """
        found: list[SourceFile] = []
        for entry in [uri] if isinstance(uri, str) else uri:
            files = list(self._expand_one(entry))
            if not files:
                raise BadInput(
                    f"{entry}: no input files there (looked for {', '.join(formats.SUFFIXES)}; "
                    "names starting with _ or . are skipped)"
                )
            found += files
        if not found:
            raise BadInput("input.uri names nothing; give a file, folder, glob or list")
        seen: set[str] = set()
        for file in found:
            if file.uri in seen:
                raise BadInput(f"{file.uri}: named twice by input.uri")
            seen.add(file.uri)
        return found

    def check(self, uri: str, etag: str) -> None:
        """Make certain that a file still has this ETag, without bringing it here.

        Raises:
            InputChanged: it is another one now, or gone; the message has old and new ETag.
        """
        if uri.startswith(HUB_SCHEME):
            return  # its URI names a commit
        now: str | None
        if uri.startswith(_REMOTE):
            store, key = self._locate(uri)
            info = _head(store, key)
            now = info.etag if info else None
        else:
            path = Path(uri)
            now = self._digest(path) if path.exists() else None
        if now != etag:
            raise InputChanged(
                f"{uri}: changed since it was planned: ETag was {etag}, is {now or 'gone'}; "
                "restore it, or start a new run"
            )

    def fetch(self, uri: str, etag: str) -> Path:
        """Return the file's local path, once it is certain to be the one with this ETag.

        Raises:
            InputChanged: it is another one now, or gone; the message has old and new ETag.
        """
        if uri.startswith(HUB_SCHEME):
            return self._hub.fetch(uri)
        if uri.startswith(_REMOTE):
            return self._fetch_remote(uri, etag)
        self.check(uri, etag)
        return Path(uri)

    def _expand_one(self, entry: str) -> Iterator[SourceFile]:
        if entry.startswith(HUB_SCHEME):
            return (SourceFile(*item) for item in self._hub.expand(entry))
        scheme, separator, rest = entry.partition("://")
        if separator and scheme in ("s3", "memory"):
            bucket, _, key = rest.partition("/")
            return self._in_store(f"{scheme}://{bucket}", key, entry)
        if separator and scheme == "file":
            entry = unquote(urlsplit(entry).path)
        path = os.path.abspath(os.path.expanduser(entry))
        if not os.path.exists(path) and not has_wildcard(path):
            raise BadInput(f"{entry}: no such file or folder ({path}); correct input.uri")
        return self._local(path, is_folder=entry.endswith("/"))

    def _local(self, path: str, *, is_folder: bool) -> Iterator[SourceFile]:
        if os.path.isfile(path) and not is_folder:
            yield self._local_file(Path(path))
            return
        pattern = None if os.path.isdir(path) else path
        root = Path(path) if pattern is None else Path(literal_prefix(path) or "/")
        store = self._open_store(str(root), self._config)
        names = [] if pattern else list(_dataset_files(store, "", str(root)))
        for name in names or sorted(_walk(root), key=os.fsencode):
            file = root / name
            if names or _is_wanted(name, key=str(file), pattern=pattern, shown=str(file)):
                yield self._local_file(file)

    def _local_file(self, path: Path) -> SourceFile:
        return SourceFile(str(path), path.stat().st_size, self._digest(path))

    def _in_store(self, root: str, key: str, entry: str) -> Iterator[SourceFile]:
        store = self._store(root)
        if key.rstrip("/"):
            _safe(key.rstrip("/"), entry)
        if key and not key.endswith("/"):
            info = _head(store, key)
            if info is not None:
                yield SourceFile(f"{root}/{key}", info.size, info.etag)
                return
        pattern = key if has_wildcard(key) else None
        prefix = literal_prefix(key) if pattern else key.rstrip("/")
        prefix = f"{prefix}/" if prefix else ""
        saved = [] if pattern else list(_dataset_files(store, prefix, entry))
        for info in [store.head(name) for name in saved] or store.list(prefix):
            shown, below = f"{root}/{info.key}", info.key.removeprefix(prefix)
            if saved or _is_wanted(below, key=info.key, pattern=pattern, shown=shown):
                _safe(info.key, shown)
                yield SourceFile(shown, info.size, info.etag)

    def _fetch_remote(self, uri: str, etag: str) -> Path:
        name = hashlib.sha256(f"{uri}\0{etag}".encode()).hexdigest()[:24]
        path = self._folder / name / uri.rpartition("/")[2][-80:]
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / "lock"):
            if not path.exists():
                store, key = self._locate(uri)
                try:
                    store.download(key, path, if_match=etag)
                except (PreconditionFailed, NotFound):
                    self.check(uri, etag)
                    raise
        return path

    def _locate(self, uri: str) -> tuple[ObjectStore, str]:
        scheme, _, rest = uri.partition("://")
        bucket, _, key = rest.partition("/")
        return self._store(f"{scheme}://{bucket}"), key

    def _store(self, root: str) -> ObjectStore:
        if root not in self._stores:
            self._stores[root] = self._open_store(root, self._config)
        return self._stores[root]

    def _digest(self, path: Path) -> str:
        """Name a local file by its bytes; a file whose status has not changed is not read again."""
        stat = path.stat()
        status = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if status not in self._digests:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._digests[status] = f"sha256:{digest}"
        return self._digests[status]


def _is_wanted(below: str, *, key: str, pattern: str | None, shown: str) -> bool:
    """Whether a file found in a folder (`below` it) or by a glob over keys is input; markers are not.

    Raises:
        BadInput: it lies in a folder and is neither a marker nor a kind of file we read.
    """
    if pattern is not None and not matches(key, pattern):
        return False
    parts = below.split("/")
    if not parts[-1] or any(part.startswith(("_", ".")) for part in parts):
        return False
    if formats.by_name(below) is None and pattern is None:
        raise BadInput(
            f"{shown}: not a kind of input file; move it away, rename it with a leading _, or give "
            "a glob such as *.parquet"
        )
    return True


def _walk(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), root)


def _dataset_files(store: ObjectStore, prefix: str, shown: str) -> Iterable[str]:
    """Return the data files of a dataset that `save_to_disk` wrote, or nothing.

    Raises:
        BadInput: the folder holds several splits, of which one must be named.
    """
    if _head(store, f"{prefix}{_SPLITS}") is not None:
        splits = json.loads(store.get(f"{prefix}{_SPLITS}")).get("splits", [])
        raise BadInput(f"{shown}: a dataset with splits {', '.join(splits)}; add one to input.uri")
    if _head(store, f"{prefix}{_STATE}") is None:
        return []
    try:
        state = json.loads(store.get(f"{prefix}{_STATE}"))
        names = [item["filename"] for item in state["_data_files"]]
    except (ValueError, KeyError, TypeError):
        return []  # some other state.json
    # The names come with the data: none of them may lead out of its folder.
    return [f"{prefix}{_safe(name, f'{shown}/{_STATE}')}" for name in names]


def _safe(key: str, shown: str) -> str:
    """Return a name that somebody else chose. Raises BadInput when it could lead elsewhere."""
    try:
        return keys.check(key)
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"{ascii(shown)[1:-1]}: {error}; rename it or give a glob without it"
        ) from None


def _head(store: ObjectStore, key: str) -> ObjectInfo | None:
    try:
        return store.head(key)
    except NotFound:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
