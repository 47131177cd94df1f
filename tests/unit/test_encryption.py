"""Encryption at the store is asked for with every object written, and a store that ignores it is refused."""

import logging
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from flows.config import JobError, load_job
from storage import probe
from storage.errors import StoreUnfit
from storage.object_store import StorageConfig
from storage.s3_client import RetryPolicy, make_client
from storage.s3_store import S3Store
from storage.s3_transfer import S3Transfer
from tests.moto_in_turn import moto_in_turn

MiB = 1 << 20
KEY = "arn:aws:kms:us-east-1:123456789012:key/11111111-2222-3333-4444-555555555555"
BASE = {"model": {"source": "m"}, "input": {"uri": "in"}, "output": {"uri": "out"}}
# Requests that make an object; a part of a multipart upload is encrypted as its upload was begun.
WRITES = ("PutObject", "CopyObject", "CreateMultipartUpload")
OTHERS = ("GetObject", "HeadObject", "DeleteObject", "UploadPart", "CompleteMultipartUpload")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with moto_in_turn():
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="sealed")
        yield "sealed"


def exercise(store: S3Store, folder: Path) -> None:
    """Write an object in every way there is."""
    store.put("put", b"1")
    etag = store.put_if_absent("create", b"2").etag
    store.put_if_match("create", b"3", etag)
    store.copy("put", "copied")
    (folder / "small").write_bytes(b"4")
    store.upload(folder / "small", "uploaded")
    (folder / "big").write_bytes(bytes(17 * MiB))
    store.upload(folder / "big", "big")
    store.copy("big", "big copy")
    store.get("big copy")
    store.delete("copied")


@pytest.mark.parametrize(
    ("kind", "key"), [("AES256", None), ("aws:kms", None), ("aws:kms", KEY), (None, None)]
)
def test_every_write_asks_for_the_encryption_and_nothing_else_does(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, key: str | None
) -> None:
    monkeypatch.setattr(S3Transfer, "copy_limit_bytes", 10 * MiB)
    monkeypatch.setattr(S3Transfer, "copy_part_bytes", 8 * MiB)
    config = StorageConfig(server_side_encryption=kind, kms_key_id=key)
    client = make_client(config)
    asked: list[tuple[str, str | None, str | None]] = []

    def watch(model: Any, params: Any, **_: Any) -> None:
        found = {name.lower(): value for name, value in params["headers"].items()}
        sealed = found.get("x-amz-server-side-encryption")
        key_id = found.get("x-amz-server-side-encryption-aws-kms-key-id")
        asked.append((model.name, sealed, key_id))

    client.meta.events.register("before-call.s3", watch)
    retry = RetryPolicy(max_attempts=2, base_s=0.001)
    store = S3Store(f"s3://{bucket}/{secrets.token_hex(4)}", config, client=client, retry=retry)
    exercise(store, tmp_path)
    probe.probe_store(store)
    assert {name for name, *_ in asked} >= {*WRITES, *OTHERS, "UploadPartCopy"}
    for name, *found in asked:
        assert found == ([kind, key] if name in WRITES else [None, None]), name
    if kind is not None:
        assert client.head_object(Bucket=bucket, Key=store._name("big"))["ServerSideEncryption"]


def test_a_store_that_leaves_the_bytes_as_they_are_is_refused(bucket: str) -> None:
    config = StorageConfig(server_side_encryption="aws:kms")
    client = make_client(config)

    def ignore(params: Any, **_: Any) -> None:
        params["headers"].pop("x-amz-server-side-encryption", None)

    client.meta.events.register("before-call.s3.PutObject", ignore)
    store = S3Store(f"s3://{bucket}/run", config, client=client)
    with pytest.raises(StoreUnfit, match=r"did not encrypt it \(aws:kms was asked for\)"):
        probe.probe_store(store)


def test_the_job_says_how_and_a_key_without_its_kind_is_refused() -> None:
    overrides = ["storage.server_side_encryption=aws:kms", f"storage.kms_key_id={KEY}"]
    job = load_job(BASE, overrides=overrides)
    assert job.storage == StorageConfig(server_side_encryption="aws:kms", kms_key_id=KEY)
    for wrong in ([overrides[1]], [overrides[1], "storage.server_side_encryption=AES256"]):
        with pytest.raises(JobError, match=r"storage\.kms_key_id: needs"):
            load_job(BASE, overrides=wrong)
    with pytest.raises(JobError, match=r"storage\.server_side_encryption: got 'rot13'"):
        load_job(BASE, overrides=["storage.server_side_encryption=rot13"])


def test_debug_logs_hold_no_bodies_and_no_tokens(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-7d1e")
    logging.getLogger("botocore").setLevel(logging.NOTSET)
    caplog.set_level(logging.DEBUG)
    store = S3Store(f"s3://{bucket}/run", client=make_client())
    store.put("k", b"row-5c2f")
    assert store.get("k") == b"row-5c2f"
    assert "token-7d1e" not in caplog.text
    assert "row-5c2f" not in caplog.text
