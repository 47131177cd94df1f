"""S3Store: a bucket's prefix on any S3 endpoint. With s3_client and s3_transfer, all there is of boto3.

create-only   one PutObject with If-None-Match: *. A 412 may be our own write whose reply was
              lost: read the object and compare bytes. Never a conditional multipart upload;
              stores ignore the condition there, or race.
swap          PutObject with If-Match, the ETag quoted; some stores want it bare (learnt once)
409, 5xx      the same request again, with jitter (s3_client.Caller)
"""

from collections.abc import Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from storage import keys
from storage.clock import Clock
from storage.errors import (
    AlreadyExists,
    CorruptObject,
    NotFound,
    PreconditionFailed,
    StorageError,
    StoreUnavailable,
)
from storage.object_store import DEFAULT_STORAGE, ObjectInfo, StorageConfig
from storage.s3_client import Again, Caller, RetryPolicy, full_checksum, make_client, status_of
from storage.s3_transfer import S3Transfer, crc64
from storage.stalls import read_whole

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["S3Store", "make_client"]


class S3Store:
    """Objects below `s3://bucket/prefix`, keys byte for byte as given.

    With `config.allow_single_writer` a condition is also checked by reading first, so that a store
    which ignores conditions serves one replica.
    """

    def __init__(
        self,
        uri: str,
        config: StorageConfig = DEFAULT_STORAGE,
        *,
        client: "S3Client | None" = None,
        retry: RetryPolicy | None = None,
        clock: Clock | None = None,
    ) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not uri.startswith("s3://") or not bucket:
            raise StorageError(f"{uri}: not an S3 location; write s3://bucket/prefix")
        self._bucket = bucket
        self._prefix = prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""
        self._client = client or make_client(config)
        self._call = Caller(retry, clock)
        self._transfer = S3Transfer(self._client, bucket, self._call, config)
        self._reads_first = config.allow_single_writer
        self._quoted = True

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def quotes_etags(self) -> bool:
        """Whether If-Match carries the ETag in quotes, as far as is known."""
        return self._quoted

    def get(self, key: str) -> bytes:
        return self._get(key)[0]

    def get_range(self, key: str, start: int, end: int, *, if_match: str | None = None) -> bytes:
        if not 0 <= start <= end:
            raise ValueError(f"range [{start}, {end}) of {key}: need 0 <= start <= end")
        if start == end:
            self._require(self.head(key), if_match)
            return b""
        condition: Any = {} if if_match is None else {"IfMatch": f'"{if_match}"'}
        name = self._name(key)

        def request() -> bytes:
            try:
                reply = self._client.get_object(
                    Bucket=self._bucket, Key=name, Range=f"bytes={start}-{end - 1}", **condition
                )
            except ClientError as error:
                if status_of(error) == 416:
                    return b""
                raise
            return _whole_body(reply, f"{self.uri}/{key}", self._call.stall_s)

        return self._call(f"GET {self.uri}/{key}", request)

    def download(self, key: str, path: Path, *, if_match: str | None = None) -> ObjectInfo:
        found = self._head(key, checksum=True)
        info = self._info(key, found)
        self._require(info, if_match)
        self._transfer.download(self._name(key), path, found)
        return info

    def head(self, key: str) -> ObjectInfo:
        return self._info(key, self._head(key))

    def put(self, key: str, data: bytes) -> ObjectInfo:
        name = self._name(key)
        reply = self._call(f"PUT {self.uri}/{key}", lambda: self._transfer.put(name, data))
        return self._written(key, len(data), reply)

    def upload(self, path: Path, key: str) -> ObjectInfo:
        done = self._transfer.upload(path, self._name(key))
        return self.head(key) if done is None else self._written(key, done.size, done.reply)

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        name = self._name(key)
        if self._reads_first and self._is_taken(key, data):
            return self.head(key)

        def request() -> ObjectInfo:
            try:
                reply = self._put_if(name, data, IfNoneMatch="*")
            except ClientError as error:
                if status_of(error) != 412:
                    raise
                if self._is_taken(key, data):
                    return self.head(key)
                # Refused, and yet nothing is there: deleted in between. Try again.
                raise Again(
                    StoreUnavailable(f"PUT {self.uri}/{key}: 412, but no object")
                ) from error
            return self._written(key, len(data), reply)

        return self._call(f"PUT {self.uri}/{key}", request)

    def put_if_match(self, key: str, data: bytes, etag: str) -> ObjectInfo:
        name = self._name(key)
        if self._reads_first:
            self._require(self.head(key), etag)

        def request() -> ObjectInfo:
            tag = f'"{etag}"' if self._quoted else etag
            try:
                reply = self._put_if(name, data, IfMatch=tag)
            except ClientError as error:
                if status_of(error) != 412:
                    raise
                stored, info = self._get(key)
                if stored == data:
                    return info
                self._require(info, etag)
                # The object is the one named, and yet refused: this store compares the other spelling.
                self._quoted = not self._quoted
                raise Again(
                    StoreUnavailable(f"PUT {self.uri}/{key}: 412 for its own ETag")
                ) from error
            return self._written(key, len(data), reply)

        return self._call(f"PUT {self.uri}/{key}", request)

    def copy(self, source: str, target: str, *, size: int | None = None) -> ObjectInfo:
        num_bytes = self.head(source).size if size is None else size
        self._transfer.copy(self._name(source), self._name(target), num_bytes)
        return self.head(target)

    def delete(self, key: str) -> None:
        name = self._name(key)
        self._call(
            f"DELETE {self.uri}/{key}",
            lambda: self._client.delete_object(Bucket=self._bucket, Key=name),
        )

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = list(self._listed(prefix))
        # Not every store lists in byte order.
        found.sort(key=lambda info: info.key.encode())
        yield from found

    def lists_in_byte_order(self, prefix: str) -> bool:
        """Whether the store's own order under `prefix` is that of the bytes."""
        names = [info.key.encode() for info in self._listed(prefix)]
        return names == sorted(names)

    def verifies_checksums(self, key: str) -> bool:
        """Whether the store refuses a body that is not what its checksum says; writes `key` if not."""
        name = self._name(key)

        def request() -> bool:
            try:
                self._client.put_object(
                    Bucket=self._bucket,
                    Key=name,
                    Body=b"damaged",
                    ChecksumCRC64NVME=crc64(b"whole"),
                    **self._transfer.encryption,
                )
            except ClientError as error:
                if status_of(error) not in (400, 501):
                    raise
                return status_of(error) == 400
            return False

        return self._call(f"PUT {self.uri}/{key}", request)

    def keeps_full_checksum(self, key: str) -> bool:
        """Whether the store tells the CRC64NVME of a whole object, which downloads are checked by."""
        return full_checksum(self._head(key, checksum=True)) is not None

    def unfinished(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield key and id of every multipart upload that was begun and neither completed nor aborted."""
        for name, upload_id in self._transfer.unfinished(self._prefix + prefix):
            yield name.removeprefix(self._prefix), upload_id

    def abandon(self, key: str, upload_id: str) -> None:
        """Abort an unfinished multipart upload; one that is gone already is no fault."""
        self._transfer.abandon(self._name(key), upload_id)

    def _name(self, key: str) -> str:
        return self._prefix + keys.check(key)

    def _get(self, key: str) -> tuple[bytes, ObjectInfo]:
        name = self._name(key)

        def request() -> tuple[bytes, ObjectInfo]:
            reply = self._client.get_object(Bucket=self._bucket, Key=name, ChecksumMode="ENABLED")
            data = _whole_body(reply, f"{self.uri}/{key}", self._call.stall_s)
            wanted = full_checksum(reply)
            if wanted is not None and crc64(data) != wanted:
                raise Again(CorruptObject(f"{self.uri}/{key}: CRC64NVME is not {wanted}"))
            return data, self._info(key, reply)

        return self._call(f"GET {self.uri}/{key}", request)

    def _head(self, key: str, *, checksum: bool = False) -> Any:
        name = self._name(key)
        mode: Any = {"ChecksumMode": "ENABLED"} if checksum else {}
        return self._call(
            f"HEAD {self.uri}/{key}",
            lambda: self._client.head_object(Bucket=self._bucket, Key=name, **mode),
        )

    def _info(self, key: str, reply: Any) -> ObjectInfo:
        modified_at: datetime = reply["LastModified"]
        return ObjectInfo(
            key, reply["ContentLength"], _bare(reply["ETag"]), modified_at.timestamp()
        )

    def _written(self, key: str, size: int, reply: Any) -> ObjectInfo:
        date = reply["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            return self.head(key)
        return ObjectInfo(key, size, _bare(reply["ETag"]), parsedate_to_datetime(date).timestamp())

    def _require(self, info: ObjectInfo, etag: str | None) -> None:
        if etag is not None and info.etag != etag:
            raise PreconditionFailed(f"{self.uri}/{info.key}: ETag is {info.etag}, not {etag}")

    def _put_if(self, name: str, data: bytes, **condition: str) -> Any:
        try:
            return self._transfer.put(name, data, **condition)
        except ClientError as error:
            if status_of(error) != 501 or not self._reads_first:
                raise
            return self._transfer.put(name, data)

    def _is_taken(self, key: str, data: bytes) -> bool:
        """True if these very bytes are stored, False if nothing is. Raises AlreadyExists otherwise."""
        try:
            if self.head(key).size == len(data) and self.get(key) == data:
                return True
        except NotFound:
            return False
        raise AlreadyExists(f"{self.uri}/{key}: other bytes are stored under this key")

    def _listed(self, prefix: str) -> Iterator[ObjectInfo]:
        token: Any = {}
        while True:
            page = self._call(f"LIST {self.uri}/{prefix}", partial(self._page, prefix, token))
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(self._prefix)
                if key:  # else the marker some tools leave for the folder itself
                    yield ObjectInfo(
                        key, item["Size"], _bare(item["ETag"]), item["LastModified"].timestamp()
                    )
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, prefix: str, token: Any) -> Any:
        return self._client.list_objects_v2(
            Bucket=self._bucket, Prefix=self._prefix + prefix, **token
        )


def _whole_body(reply: Any, what: str, stall_s: float) -> bytes:
    data = read_whole(reply["Body"], stall_s)
    if len(data) != reply["ContentLength"]:
        raise Again(StoreUnavailable(f"{what}: {len(data)} of {reply['ContentLength']} bytes came"))
    return data


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')
