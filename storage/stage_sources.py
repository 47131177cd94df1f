"""Where a model comes from: what files it has, what is promised of them, and how to read a range.

s3://bucket/prefix/     any endpoint; ranges pinned by ETag
/folder or file://      see storage.local_source
hf://repo@revision      see storage.hub_source, which downloads whole files
"""

import http.client
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from storage.checksums import Checksum
from storage.errors import BadInput, InputChanged, NotFound, PreconditionFailed, StoreUnavailable
from storage.object_store import StorageConfig
from storage.s3_client import Caller, RetryPolicy, as_storage_error, make_client, promised_checksum
from storage.stalls import PIECE_BYTES, Pace, read_whole

_HEAD_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a model, as its source describes it."""

    name: str
    """Relative to the model folder, POSIX separators, checked against traversal."""

    size: int
    etag: str
    """Changes whenever the bytes change."""

    checksum: Checksum | None = None
    """What the source promises of the whole file's bytes."""

    promised_by: str = ""
    """Who made that promise, in words: "the store", "the Hub", "SHA256SUMS"."""

    fingerprint: str = ""
    """Tells other bytes under the same name and size apart, without vouching for every byte."""


class RangeBody(Protocol):
    """The bytes of one range, once through; used by one thread."""

    def readinto(self, view: memoryview, /) -> int:
        """Fill `view` from its front; 0 at the end of the range. Raises StoreUnavailable, InputChanged."""

    def close(self) -> None:
        """Give the connection back; must be called once, whatever happened."""


class RangedSource(Protocol):
    """A model whose files can be read in ranges, in any order, by several threads."""

    @property
    def uri(self) -> str:
        """Canonical form of the source."""

    def list_files(self) -> list[SourceFile]:
        """Every file, without checksums; one request. Raises NotFound, AccessDenied."""

    def describe(self, files: list[SourceFile]) -> list[SourceFile]:
        """The same files with the checksums that the source holds. Raises InputChanged."""

    def read(self, file: SourceFile) -> bytes:
        """A small file, whole."""

    def open_range(self, file: SourceFile, start: int, end: int) -> RangeBody:
        """Start reading bytes [start, end).

        Raises:
            InputChanged: the file is no longer the one that was listed.
            StoreUnavailable: a passing fault; the caller may ask again.
        """


class S3Source:
    """The objects below a prefix, or one object."""

    def __init__(
        self, uri: str, client: Any, *, endpoint: str = "", retry: RetryPolicy | None = None
    ) -> None:
        """`client` is a boto3 S3 client; `endpoint` tells equal buckets of two stores apart."""
        self._bucket, _, key = uri.removeprefix("s3://").partition("/")
        if not self._bucket or not key:
            raise BadInput(f"{uri}: a model source needs a bucket and a prefix")
        self._is_object = key.endswith(".gguf")
        self._prefix = key.rpartition("/")[0] if self._is_object else key.rstrip("/")
        self._prefix += "/" if self._prefix else ""
        self._key = key
        self._client = client
        self._caller = Caller(retry)
        self.uri = f"s3://{self._bucket}/{key if self._is_object else self._prefix}"
        self.identity = f"{endpoint}|{self.uri}"

    def list_files(self) -> list[SourceFile]:
        start = self._key if self._is_object else self._prefix

        def list_all() -> list[Any]:
            pages = self._client.get_paginator("list_objects_v2")
            replies = pages.paginate(Bucket=self._bucket, Prefix=start)
            return [item for reply in replies for item in reply.get("Contents", [])]

        objects = self._caller(self.uri, list_all)
        files = [
            SourceFile(
                name=item["Key"].removeprefix(self._prefix),
                size=item["Size"],
                etag=item["ETag"].strip('"'),
            )
            for item in objects
            if not item["Key"].endswith("/") and (not self._is_object or item["Key"] == self._key)
        ]
        if not files:
            raise NotFound(f"{self.uri}: no object there")
        return files

    def describe(self, files: list[SourceFile]) -> list[SourceFile]:
        with ThreadPoolExecutor(_HEAD_THREADS) as pool:
            return list(pool.map(self._head, files))

    def read(self, file: SourceFile) -> bytes:
        def get() -> bytes:
            reply = self._client.get_object(**self._pinned(file))
            return read_whole(reply["Body"], self._caller.stall_s)

        with _changed_meanwhile():
            return self._caller(self._where(file), get)

    def open_range(self, file: SourceFile, start: int, end: int) -> "_HttpBody":
        where = self._where(file)
        with _changed_meanwhile():
            try:
                reply = self._client.get_object(
                    **self._pinned(file), Range=f"bytes={start}-{end - 1}"
                )
            except (ClientError, BotoCoreError, HTTPError) as error:
                raise as_storage_error(error, where) from error
        body = _HttpBody(reply["Body"], end - start, where, self._caller.stall_s)
        expected, found = f"bytes {start}-{end - 1}/{file.size}", reply.get("ContentRange")
        if found != expected:
            body.close()
            raise StoreUnavailable(f"{where}: asked for {expected}, was given {found}")
        etag = reply.get("ETag", file.etag).strip('"')
        if etag != file.etag:  # a store that does not heed If-Match
            body.close()
            raise InputChanged(
                f"{where}: changed while it was copied: ETag {file.etag} became {etag}"
            )
        return body

    def _where(self, file: SourceFile) -> str:
        return f"s3://{self._bucket}/{self._prefix}{file.name}"

    def _pinned(self, file: SourceFile) -> dict[str, str]:
        """Name the object, and refuse any other bytes under its name."""
        key = self._prefix + file.name
        return {"Bucket": self._bucket, "Key": key, "IfMatch": f'"{file.etag}"'}

    def _head(self, file: SourceFile) -> SourceFile:
        where = self._where(file)
        with _changed_meanwhile():
            reply = self._caller(
                where,
                lambda: self._client.head_object(**self._pinned(file), ChecksumMode="ENABLED"),
            )
        etag = reply["ETag"].strip('"')
        if (etag, reply["ContentLength"]) != (file.etag, file.size):
            raise InputChanged(
                f"{where}: changed while it was listed: ETag {file.etag} became {etag}"
            )
        checksum = promised_checksum(reply)
        return replace(file, checksum=checksum, promised_by="the store") if checksum else file


class _HttpBody:
    """An HTTP body, read into the caller's buffer without a copy in between."""

    def __init__(self, body: Any, num_bytes: int, where: str, stall_s: float) -> None:
        self._stream = body._raw_stream
        self._pace = Pace(self._stream, stall_s)
        # http.client's own readinto fills our buffer; urllib3's copies once more.
        self._reader = getattr(self._stream, "_fp", None) or self._stream
        self._left = num_bytes
        self._where = where

    def readinto(self, view: memoryview, /) -> int:
        try:
            with self._pace:
                count = int(self._reader.readinto(view[:PIECE_BYTES]))
        except (http.client.HTTPException, HTTPError, OSError) as error:
            raise StoreUnavailable(f"{self._where}: {error!r}") from error
        if not count and self._pace.is_cut:
            raise StoreUnavailable(
                f"{self._where}: fewer than {PIECE_BYTES >> 20} MiB came in {self._pace.stall_s:.0f} s"
            )
        self._left -= count
        return count

    def close(self) -> None:
        self._pace.close()
        if self._left == 0:
            self._stream.release_conn()
        else:  # part of the body is still on its way: nobody can use this connection again
            self._stream.close()


def open_s3(source: str, config: StorageConfig, retry: RetryPolicy | None = None) -> S3Source:
    """Open a source on S3. Raises BadInput."""
    retry = retry or RetryPolicy()
    client = make_client(config, read_timeout_s=retry.stall_s)
    return S3Source(source, client, endpoint=config.endpoint_url or "", retry=retry)


@contextmanager
def _changed_meanwhile() -> Iterator[None]:
    """A pin that no longer holds means that the source was replaced."""
    try:
        yield
    except PreconditionFailed as error:
        raise InputChanged(
            f"{error}; it was replaced while it was staged; stage it again"
        ) from error
