"""The one door to stored bytes: get, put, create-only put, compare-and-swap, list, copy.

A store is rooted at a prefix (a folder, or `s3://bucket/prefix`); keys are relative to it and are
what `storage.keys` spells. `open_store(uri)` picks the implementation:

    MemoryStore   a dictionary; ships with the product and is the double in every unit test
    LocalStore    a folder; create-only by os.link
    S3Store       any S3 endpoint; create-only by If-None-Match, with a nonce for lost replies
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from storage.errors import BadInput


class ObjectInfo(NamedTuple):
    """What a store says of an object without reading it."""

    key: str
    size: int  # bytes
    etag: str  # as the store gives it, quotes stripped; changes whenever the bytes change
    modified_at: float  # store's clock, seconds since the epoch; a hint, never an argument


Encryption = Literal["AES256", "aws:kms", "aws:kms:dsse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageConfig:
    """How to reach object storage; every field falls back to the usual AWS environment."""

    endpoint_url: str | None = None
    """S3 endpoint for stores that are not AWS."""

    region: str | None = None
    """AWS region of the bucket."""

    profile: str | None = None
    """Named profile in the AWS configuration files."""

    allow_single_writer: bool = False
    """Use a store without working conditional writes; the caller promises to run one replica."""

    server_side_encryption: Encryption | None = None
    """Asked of the store with every object written; null: whatever the bucket does by itself."""

    kms_key_id: str | None = None
    """The key to encrypt with, for `aws:kms`; null: the account's own S3 key."""


DEFAULT_STORAGE = StorageConfig()


class ObjectStore(Protocol):
    """Bytes under keys, rooted at `uri`. Methods raise `storage.errors` only; all may be called by threads."""

    @property
    def uri(self) -> str:
        """The root, without a trailing slash."""

    def get(self, key: str) -> bytes:
        """Return the whole object. Raises NotFound."""

    def get_range(self, key: str, start: int, end: int, *, if_match: str | None = None) -> bytes:
        """Return bytes [start, end), fewer past the object's end. Raises NotFound, PreconditionFailed."""

    def download(self, key: str, path: Path, *, if_match: str | None = None) -> ObjectInfo:
        """Copy the object to a local file, whole or not at all. Raises NotFound, PreconditionFailed."""

    def head(self, key: str) -> ObjectInfo:
        """Describe one object. Raises NotFound."""

    def put(self, key: str, data: bytes) -> ObjectInfo:
        """Write, replacing whatever is there. Readers see the old object or the new one, never a part."""

    def upload(self, path: Path, key: str) -> ObjectInfo:
        """Write a local file as an object, like `put`."""

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        """Create the object; exactly one of any number of racing callers succeeds.

        Safe against lost replies: when the stored bytes turn out to be these very bytes, the write
        was ours. So `data` must carry a nonce whenever two callers could write the same bytes and
        it matters who won.

        Raises:
            AlreadyExists: other bytes are stored under the key.
        """

    def put_if_match(self, key: str, data: bytes, etag: str) -> ObjectInfo:
        """Replace the object if it is still the one with `etag`. Raises PreconditionFailed, NotFound."""

    def copy(self, source: str, target: str, *, size: int | None = None) -> ObjectInfo:
        """Copy within the store, without moving bytes through this process where the store can.

        Args:
            source: Key to copy from.
            target: Key to replace or create.
            size: The source's bytes, where the caller knows; saves a request.
        """

    def delete(self, key: str) -> None:
        """Remove the object; removing what is not there is no fault."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with `prefix`, in key order, however many there are."""


def open_store(uri: str, config: StorageConfig = DEFAULT_STORAGE) -> ObjectStore:
    """Open the store rooted at `uri`: a path, `file://`, `s3://bucket/prefix` or `memory://name`.

    Opening touches nothing: whether the place exists shows when it is used.

    Raises:
        BadInput: the scheme is unknown.
        StorageError: the S3 settings do not make a client.
    """
    scheme, separator, rest = uri.partition("://")
    if scheme == "s3" and separator:
        from storage.s3_store import S3Store  # boto3 takes a while to import

        return S3Store(uri, config)
    if scheme == "memory" and separator:
        from storage.memory_store import MemoryStore

        return MemoryStore.open(uri)
    from storage.local_store import LocalStore

    if scheme == "file" and separator:
        path = unquote(urlsplit(uri).path)
    elif separator and scheme.isalnum():
        raise BadInput(
            f"{scheme}://{rest}: unknown scheme; use a folder, file://, s3:// or memory://"
        )
    else:
        path = os.path.expanduser(uri)
    return LocalStore(path, allow_single_writer=config.allow_single_writer)
