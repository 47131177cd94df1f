"""MemoryStore: objects in a dictionary. The double of every unit test, and `memory://` for tries."""

import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from storage import keys
from storage.clock import Clock, SystemClock
from storage.errors import AlreadyExists, NotFound, PreconditionFailed
from storage.object_store import ObjectInfo


class _Object(NamedTuple):
    data: bytes
    modified_at: float


@dataclass(slots=True)
class _Bucket:
    objects: dict[str, _Object] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)


_NAMED: dict[str, _Bucket] = {}
_NAMED_LOCK = threading.Lock()


class MemoryStore:
    """An object store that lives as long as the process; every method is one atomic step.

    `open` shares objects by name within the process, as two clients of one bucket would.
    """

    def __init__(self, *, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._bucket = _Bucket()
        self._prefix = ""
        self._uri = f"memory://{id(self):x}"

    @classmethod
    def forget(cls, uri: str) -> None:
        """Drop a bucket and all that is in it."""
        with _NAMED_LOCK:
            _NAMED.pop(uri.removeprefix("memory://").strip("/").partition("/")[0], None)

    @classmethod
    def open(cls, uri: str) -> "MemoryStore":
        """Open `memory://bucket/prefix`; equal buckets are the same objects."""
        bucket, _, prefix = uri.removeprefix("memory://").strip("/").partition("/")
        store = cls()
        with _NAMED_LOCK:
            store._bucket = _NAMED.setdefault(bucket, store._bucket)
        store._prefix = prefix.rstrip("/") + "/" if prefix else ""
        store._uri = uri.rstrip("/")
        return store

    @property
    def uri(self) -> str:
        return self._uri

    def get(self, key: str) -> bytes:
        with self._bucket.lock:
            return self._object(key).data

    def get_range(self, key: str, start: int, end: int, *, if_match: str | None = None) -> bytes:
        if not 0 <= start <= end:
            raise ValueError(f"range [{start}, {end}) of {key}: need 0 <= start <= end")
        with self._bucket.lock:
            self._require(key, if_match)
            return self._object(key).data[start:end]

    def download(self, key: str, path: Path, *, if_match: str | None = None) -> ObjectInfo:
        with self._bucket.lock:
            self._require(key, if_match)
            data, info = self._object(key).data, self.head(key)
        partial = path.with_name(f".{os.urandom(12).hex()}.partial")
        partial.write_bytes(data)
        partial.replace(path)
        return info

    def head(self, key: str) -> ObjectInfo:
        with self._bucket.lock:
            return _info(key, self._object(key))

    def put(self, key: str, data: bytes) -> ObjectInfo:
        with self._bucket.lock:
            self._bucket.objects[self._name(key)] = _Object(bytes(data), self._clock.now())
            return self.head(key)

    def upload(self, path: Path, key: str) -> ObjectInfo:
        return self.put(key, path.read_bytes())

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        with self._bucket.lock:
            stored = self._bucket.objects.get(self._name(key))
            if stored is None:
                return self.put(key, data)
            if stored.data != data:
                raise AlreadyExists(f"{self.uri}/{key}: other bytes are stored under this key")
            return _info(key, stored)

    def put_if_match(self, key: str, data: bytes, etag: str) -> ObjectInfo:
        with self._bucket.lock:
            self._require(key, etag)
            return self.put(key, data)

    def copy(self, source: str, target: str, *, size: int | None = None) -> ObjectInfo:
        with self._bucket.lock:
            return self.put(target, self._object(source).data)

    def delete(self, key: str) -> None:
        with self._bucket.lock:
            self._bucket.objects.pop(self._name(key), None)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._bucket.lock:
            found = {
                name.removeprefix(self._prefix): stored
                for name, stored in self._bucket.objects.items()
                if name.startswith(self._prefix + prefix)
            }
        for key in sorted(found, key=str.encode):
            yield _info(key, found[key])

    def _name(self, key: str) -> str:
        return self._prefix + keys.check(key)

    def _object(self, key: str) -> _Object:
        try:
            return self._bucket.objects[self._name(key)]
        except KeyError:
            raise NotFound(f"{self.uri}/{key}: no such object") from None

    def _require(self, key: str, etag: str | None) -> None:
        found = self.head(key).etag
        if etag is not None and found != etag:
            raise PreconditionFailed(f"{self.uri}/{key}: ETag is {found}, not {etag}")


def _info(key: str, stored: _Object) -> ObjectInfo:
    etag = hashlib.sha256(stored.data).hexdigest()[:32]
    return ObjectInfo(key, len(stored.data), etag, stored.modified_at)
