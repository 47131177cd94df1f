"""Whole objects to and from S3: checked downloads, multipart uploads, copies within the store.

A download is ranges of one ETag, written in place into a hidden file. Their CRC64NVMEs are combined
and compared with the store's, where it keeps one for the whole object; where it keeps another checksum
of the whole, the file is read once more for it. Only then it gets its name.
"""

import base64
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from awscrt.checksums import combine_crc64nvme, crc64nvme
from botocore.exceptions import BotoCoreError, ClientError

from storage import encryption
from storage.checksums import CRC64NVME, file_checksum
from storage.errors import CorruptObject, NotFound, StorageError, StoreUnavailable
from storage.local_errors import translate
from storage.object_store import DEFAULT_STORAGE, StorageConfig
from storage.s3_client import Again, Caller, full_checksum, promised_checksum, status_of
from storage.stalls import read_whole

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_Result = TypeVar("_Result")

MiB = 1 << 20
_MAX_PARTS = 10_000


def crc64(data: bytes) -> str:
    """Return the CRC64NVME as S3 spells it."""
    return _spell(crc64nvme(data))


def _spell(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(8, "big")).decode()


class Uploaded(NamedTuple):
    """An object just written, and the reply to it."""

    size: int  # bytes
    reply: Any


class S3Transfer:
    """Moves whole objects of one bucket; names are full object names."""

    chunk_bytes = 8 * MiB
    """Size of a ranged read and of an uploaded part."""

    put_limit_bytes = 16 * MiB
    """Larger files go up in parts."""

    copy_limit_bytes = 5 * 1024 * MiB
    """S3 copies no more than this in one request."""

    copy_part_bytes = 512 * MiB

    num_threads = 4

    def __init__(
        self,
        client: "S3Client",
        bucket: str,
        call: Caller,
        config: StorageConfig = DEFAULT_STORAGE,
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._call = call
        self.encryption = encryption.asked_of(config)
        """How every object is encrypted at the store, as boto3 spells it."""
        # A user who set AWS_REQUEST_CHECKSUM_CALCULATION=when_required has a store that needs it.
        calculation = client.meta.config.request_checksum_calculation  # type: ignore[attr-defined]
        self._sums: Any = (
            {} if calculation == "when_required" else {"ChecksumAlgorithm": "CRC64NVME"}
        )

    def put(self, name: str, data: bytes, **condition: Any) -> Any:
        """One PutObject, whole, once: whoever repeats it sends the whole body again."""
        reply = self._client.put_object(
            Bucket=self._bucket, Key=name, Body=data, **self._sums, **self.encryption, **condition
        )
        encryption.require(self.encryption, reply, f"s3://{self._bucket}/{name}")
        return reply

    def download(self, name: str, path: Path, found: Any, *, tries: int = 3) -> None:
        """Write the object that `found` (a HEAD with checksum) describes to `path`, whole or not at all.

        Raises:
            CorruptObject: the bytes that came are not those the store promises, `tries` times over.
            PreconditionFailed: the object was replaced meanwhile.
            NoSpace: there is no room for it.
        """
        hidden = path.with_name(f".{os.urandom(12).hex()}.partial")
        wanted = promised_checksum(found)
        size = found["ContentLength"]
        try:
            with translate(path, size), hidden.open("xb") as file:
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)
                for left in reversed(range(tries)):
                    came = CRC64NVME.encode(self._fill(name, file.fileno(), size, found["ETag"]))
                    if wanted is not None and wanted.algorithm != came.algorithm:
                        came = file_checksum(hidden, wanted.algorithm)
                    if wanted in (None, came):
                        break
                    if not left:
                        raise CorruptObject(
                            f"s3://{self._bucket}/{name}: {came} came, the store says {wanted}, "
                            f"{tries} times; nothing was kept"
                        )
                os.fsync(file.fileno())
                hidden.replace(path)
        finally:
            hidden.unlink(missing_ok=True)

    def upload(self, path: Path, name: str) -> Uploaded | None:
        """Write the file as an object; a failed request is repeated with its whole body.

        Returns:
            What the store said of an object that went up in one piece.
        """
        with translate(path):
            size = path.stat().st_size
            if size <= self.put_limit_bytes:
                data = path.read_bytes()
                what = f"PUT s3://{self._bucket}/{name}"
                return Uploaded(size, self._call(what, lambda: self.put(name, data)))
        part_bytes = max(self.chunk_bytes, math.ceil(size / _MAX_PARTS))
        crcs: dict[int, tuple[int, int]] = {}

        def send(upload_id: str, number: int) -> Any:
            with translate(path), path.open("rb") as file:
                file.seek((number - 1) * part_bytes)
                data = file.read(part_bytes)
            crcs[number] = (crc64nvme(data), len(data))
            return self._client.upload_part(
                Bucket=self._bucket,
                Key=name,
                UploadId=upload_id,
                PartNumber=number,
                Body=data,
                **self._sums,
            )

        self._multipart(name, math.ceil(size / part_bytes), send)
        if sum(length for _, length in crcs.values()) != size:
            raise StorageError(f"{path}: changed while it was uploaded; upload it again")
        self._check(name, size, _combine(crcs[number] for number in sorted(crcs)))
        return None

    def copy(self, source: str, target: str, size: int) -> None:
        """Copy within the bucket; no byte passes through this process."""
        origin: Any = {"Bucket": self._bucket, "Key": source}
        if size <= self.copy_limit_bytes:
            self._call(
                f"COPY s3://{self._bucket}/{source} to {target}",
                lambda: self._client.copy_object(
                    Bucket=self._bucket, Key=target, CopySource=origin, **self.encryption
                ),
            )
            return
        part_bytes = max(self.copy_part_bytes, math.ceil(size / _MAX_PARTS))

        def send(upload_id: str, number: int) -> Any:
            start = (number - 1) * part_bytes
            reply = self._client.upload_part_copy(
                Bucket=self._bucket,
                Key=target,
                UploadId=upload_id,
                PartNumber=number,
                CopySource=origin,
                CopySourceRange=f"bytes={start}-{min(start + part_bytes, size) - 1}",
            )
            return reply["CopyPartResult"]

        self._multipart(target, math.ceil(size / part_bytes), send)

    def unfinished(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield name and id of every multipart upload that was begun and not ended."""
        marker: Any = {}
        while True:
            page = self._call(
                f"LIST uploads of s3://{self._bucket}/{prefix}",
                partial(
                    self._client.list_multipart_uploads,
                    Bucket=self._bucket,
                    Prefix=prefix,
                    **marker,
                ),
            )
            for upload in page.get("Uploads", []):
                yield upload["Key"], upload["UploadId"]
            if not page.get("IsTruncated"):
                return
            marker = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def abandon(self, name: str, upload_id: str) -> None:
        """Abort a multipart upload, if it is still there."""
        with suppress(NotFound):
            self._call(
                f"ABORT s3://{self._bucket}/{name}",
                lambda: self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=name, UploadId=upload_id
                ),
            )

    def _fill(self, name: str, descriptor: int, size: int, etag: str) -> int:
        """Write every range in its place; return the CRC of the whole."""
        starts = range(0, size, self.chunk_bytes)
        fetch = partial(self._fetch, name, descriptor, size, etag)
        return _combine(self._each(fetch, starts))

    def _fetch(
        self, name: str, descriptor: int, size: int, etag: str, start: int
    ) -> tuple[int, int]:
        end = min(start + self.chunk_bytes, size)

        def request() -> tuple[int, int]:
            reply = self._client.get_object(
                Bucket=self._bucket, Key=name, Range=f"bytes={start}-{end - 1}", IfMatch=etag
            )
            data = read_whole(reply["Body"], self._call.stall_s)
            place = reply.get("ContentRange")
            if len(data) != end - start or place != f"bytes {start}-{end - 1}/{size}":
                fact = f"asked for bytes {start}-{end - 1}, {len(data)} came as {place}"
                raise Again(StoreUnavailable(f"s3://{self._bucket}/{name}: {fact}"))
            os.pwrite(descriptor, data, start)
            return crc64nvme(data), len(data)

        return self._call(f"GET s3://{self._bucket}/{name}", request)

    def _multipart(self, name: str, num_parts: int, send: Callable[[str, int], Any]) -> None:
        what = f"PUT s3://{self._bucket}/{name}"
        place: Any = {"Bucket": self._bucket, "Key": name}
        kind = {**self._sums, "ChecksumType": "FULL_OBJECT"} if self._sums else {}
        kind |= self.encryption
        begun = self._call(what, lambda: self._client.create_multipart_upload(**place, **kind))
        place["UploadId"] = begun["UploadId"]
        try:
            etags = self._each(
                lambda number: self._call(what, lambda: send(begun["UploadId"], number))["ETag"],
                range(1, num_parts + 1),
            )
            parts: Any = [{"PartNumber": i, "ETag": etag} for i, etag in enumerate(etags, start=1)]
            self._call(what, lambda: self._complete(place, parts))
        except StorageError:
            self._abort(place)
            raise

    def _complete(self, place: Any, parts: Any) -> None:
        try:
            self._client.complete_multipart_upload(**place, MultipartUpload={"Parts": parts})
        except ClientError as error:
            # No such upload: an earlier try completed it and its reply was lost. _check decides.
            if status_of(error) != 404:
                raise

    def _abort(self, place: Any) -> None:
        # If it fails too, the bucket's lifecycle rule removes what is left.
        with suppress(ClientError, BotoCoreError):
            self._client.abort_multipart_upload(**place)

    def _check(self, name: str, size: int, crc: int) -> None:
        what = f"s3://{self._bucket}/{name}"
        found = self._call(
            f"HEAD {what}",
            lambda: self._client.head_object(Bucket=self._bucket, Key=name, ChecksumMode="ENABLED"),
        )
        stored = full_checksum(found)
        if found["ContentLength"] != size or stored not in {None, _spell(crc)}:
            raise CorruptObject(
                f"{what}: uploaded {size} bytes with CRC64NVME {_spell(crc)}, the store has "
                f"{found['ContentLength']} with {stored}; upload it again"
            )

    def _each(self, work: Callable[[int], _Result], items: Sequence[int]) -> list[_Result]:
        """Run `work` over the items on a few threads; results in order, the first fault raised."""
        if len(items) <= 1:
            return [work(item) for item in items]
        with ThreadPoolExecutor(min(self.num_threads, len(items))) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()


def _combine(crcs: Iterable[tuple[int, int]]) -> int:
    """Join (CRC64NVME, length) of consecutive pieces into that of the whole."""
    whole = 0
    for crc, length in crcs:
        whole = combine_crc64nvme(whole, crc, length)
    return whole
