import base64
import hashlib
import io
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ClientError, IncompleteReadError, ReadTimeoutError
from botocore.response import StreamingBody
from botocore.stub import Stubber
from urllib3 import HTTPResponse

from storage import probe
from storage.checksums import Checksum
from storage.clock import FrozenClock
from storage.errors import (
    AccessDenied,
    AlreadyExists,
    CorruptObject,
    InputChanged,
    NotFound,
    PreconditionFailed,
    StorageError,
    StoreUnavailable,
    StoreUnfit,
)
from storage.object_store import StorageConfig
from storage.s3_client import Again, Caller, RetryPolicy, as_storage_error, make_client
from storage.s3_store import S3Store
from storage.s3_transfer import S3Transfer
from storage.stage_sources import S3Source, SourceFile
from tests.moto_in_turn import moto_in_turn

MiB = 1 << 20


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, moto_in_turn():
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="client")
        yield "client"


@pytest.fixture
def client(bucket: str) -> Any:
    return make_client()


def store_on(client: Any, bucket: str, config: StorageConfig | None = None) -> S3Store:
    retry = RetryPolicy(max_attempts=5, base_s=0.001, cap_s=0.01)
    uri = f"s3://{bucket}/{secrets.token_hex(4)}"
    return S3Store(uri, config or StorageConfig(), client=client, retry=retry)


def refusal(status: int, code: str) -> ClientError:
    reply: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(reply, "PutObject")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (refusal(403, "AccessDenied"), AccessDenied),
        (refusal(403, "SignatureDoesNotMatch"), AccessDenied),
        (refusal(400, "ExpiredToken"), AccessDenied),
        (refusal(404, "NoSuchKey"), NotFound),
        (refusal(404, "404"), NotFound),
        (refusal(412, "PreconditionFailed"), PreconditionFailed),
        (refusal(409, "ConditionalRequestConflict"), StoreUnavailable),
        (refusal(429, "TooManyRequests"), StoreUnavailable),
        (refusal(500, "InternalError"), StoreUnavailable),
        (refusal(503, "SlowDown"), StoreUnavailable),
        (refusal(400, "RequestTimeout"), StoreUnavailable),
        (refusal(400, "BadDigest"), StoreUnavailable),
        (refusal(501, "NotImplemented"), StoreUnfit),
        (refusal(400, "InvalidArgument"), StorageError),
        (ReadTimeoutError(endpoint_url="http://x"), StoreUnavailable),
        (IncompleteReadError(actual_bytes=1, expected_bytes=2), StoreUnavailable),
    ],
)
def test_each_refusal_has_its_type(error: Exception, expected: type[StorageError]) -> None:
    assert type(as_storage_error(error, "PUT k")) is expected


def test_a_missing_bucket_is_named_as_such(client: Any) -> None:
    store = S3Store("s3://no-such-bucket/run", client=client)
    with pytest.raises(NotFound, match=r"no-such-bucket.*the bucket does not exist"):
        store.put("k", b"x")
    with pytest.raises(NotFound, match="the bucket does not exist"):
        list(store.list())


def test_what_may_pass_is_repeated_and_what_cannot_is_not(frozen_clock: FrozenClock) -> None:
    caller = Caller(RetryPolicy(max_attempts=4), frozen_clock)
    for error, expected, num_tries in (
        (refusal(503, "SlowDown"), StoreUnavailable, 4),
        (refusal(409, "Conflict"), StoreUnavailable, 4),
        (Again(CorruptObject("flipped")), CorruptObject, 4),
        (refusal(403, "AccessDenied"), AccessDenied, 1),
        (refusal(412, "PreconditionFailed"), PreconditionFailed, 1),
    ):
        tries = []

        def request(error: Exception = error, tries: list[int] = tries) -> None:
            tries.append(1)
            raise error

        with pytest.raises(expected):
            caller("PUT k", request)
        assert len(tries) == num_tries


def test_damage_is_counted_apart_from_refusals(frozen_clock: FrozenClock) -> None:
    faults = [*[refusal(503, "SlowDown")] * 6, *[Again(CorruptObject("flipped"))] * 3]

    def request() -> str:
        if faults:
            raise faults.pop(0)
        return "whole"

    assert Caller(RetryPolicy(max_attempts=14), frozen_clock)("GET k", request) == "whole"


def test_the_waits_grow_have_jitter_and_last_through_a_restart_of_the_store() -> None:
    policy = RetryPolicy()
    waits = [[policy.delay_s(attempt) for attempt in range(13)] for _ in range(20)]
    assert all(20 < sum(wait) < 45 for wait in waits)
    assert len({wait[0] for wait in waits}) > 1
    assert max(max(wait) for wait in waits) <= policy.cap_s


def test_another_endpoint_is_not_asked_for_this_machines_role(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    # Were it asked, this address would refuse after a second.
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    config = StorageConfig(endpoint_url="http://127.0.0.1:9")
    client = make_client(config)
    assert client.meta.endpoint_url == "http://127.0.0.1:9"
    with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
        S3Store("s3://bucket/run", config, client=client).get("k")


def test_a_profile_that_does_not_exist_is_named() -> None:
    with pytest.raises(StorageError, match=r"no-such-profile.*check the storage settings"):
        make_client(StorageConfig(profile="no-such-profile"))


def test_a_store_that_wants_etags_without_quotes_is_learnt(client: Any, bucket: str) -> None:
    def picky(params: Any, **_: Any) -> Any:
        if '"' not in params["headers"].get("If-Match", ""):
            return None
        return refused(412, "PreconditionFailed")

    client.meta.events.register("before-call.s3.PutObject", picky)
    store = store_on(client, bucket)
    etag = store.put("k", b"1").etag
    etag = store.put_if_match("k", b"2", etag).etag
    assert not store.quotes_etags
    assert store.put_if_match("k", b"3", etag).etag == store.head("k").etag
    with pytest.raises(PreconditionFailed):
        store.put_if_match("k", b"4", etag)


def test_a_store_that_ignores_conditions_is_refused_and_serves_one_writer(
    client: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    def forget(params: Any, **_: Any) -> None:
        params["headers"].pop("If-None-Match", None)
        params["headers"].pop("If-Match", None)

    client.meta.events.register("before-call.s3.PutObject", forget)
    with pytest.raises(StoreUnfit, match="a create-only write replaced an object"):
        probe.probe_store(store_on(client, bucket))
    store = store_on(client, bucket, StorageConfig(allow_single_writer=True))
    first = store.put_if_absent("k", b"1")
    assert store.put_if_absent("k", b"1").etag == first.etag
    with pytest.raises(AlreadyExists):
        store.put_if_absent("k", b"2")
    with pytest.raises(PreconditionFailed):
        store.put_if_match("k", b"2", "0" * 32)
    assert store.get("k") == b"1"


def test_a_store_without_conditional_writes_serves_one_writer(client: Any, bucket: str) -> None:
    def lacks(params: Any, **_: Any) -> Any:
        if "If-None-Match" not in params["headers"]:
            return None
        return refused(501, "NotImplemented")

    client.meta.events.register("before-call.s3.PutObject", lacks)
    with pytest.raises(StoreUnfit, match="501 NotImplemented"):
        store_on(client, bucket).put_if_absent("k", b"1")
    store = store_on(client, bucket, StorageConfig(allow_single_writer=True))
    store.put_if_absent("k", b"1")
    with pytest.raises(AlreadyExists):
        store.put_if_absent("k", b"2")


def test_checksums_are_left_out_where_the_user_says_the_store_cannot(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bool] = []

    def watch(params: Any, **_: Any) -> None:
        sent.append(any("checksum" in name.lower() for name in params["headers"]))

    for setting in ("when_supported", "when_required"):
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", setting)
        client = make_client()
        client.meta.events.register("before-call.s3.PutObject", watch)
        store_on(client, bucket).put("k", b"x")
    assert sent == [True, False]


def test_a_big_object_is_copied_in_parts(
    client: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Transfer, "copy_limit_bytes", 6 * MiB)
    monkeypatch.setattr(S3Transfer, "copy_part_bytes", 5 * MiB)
    store = store_on(client, bucket)
    (tmp_path / "big").write_bytes(bytes(range(256)) * (13 * MiB // 256) + b"end")
    store.upload(tmp_path / "big", "big")
    assert store.copy("big", "copy").size == 13 * MiB + 3
    assert store.get("copy") == (tmp_path / "big").read_bytes()


def refused(status: int, code: str) -> tuple[Any, Any]:
    """A reply as botocore takes it from a handler: the request is never sent."""
    return AWSResponse("http://store", status, {}, None), refusal(status, code).response


def test_a_checksum_of_the_parts_checksums_promises_nothing_of_a_source_s_bytes() -> None:
    client = boto3.client(
        "s3", region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s"
    )
    listed = SourceFile(name="w", size=4, etag="e")
    for value, promised in (("AAAAAA==-2", None), ("AAAAAA==", Checksum("crc32c", "AAAAAA=="))):
        with Stubber(client) as stub:
            reply = {"ETag": '"e"', "ContentLength": 4, "ChecksumCRC32C": value}
            stub.add_response("head_object", reply)
            (found,) = S3Source("s3://b/m/", client).describe([listed])
        assert found.checksum == promised


def test_a_sha256_of_the_whole_object_is_a_promise_where_there_is_none_that_is_faster() -> None:
    client = boto3.client(
        "s3", region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s"
    )
    listed = SourceFile(name="w", size=4, etag="e")
    digest = hashlib.sha256(b"abcd")
    spelt = base64.b64encode(digest.digest()).decode()
    whole = Checksum("sha256", digest.hexdigest())
    for told, promised in (
        ({"ChecksumSHA256": spelt, "ChecksumType": "FULL_OBJECT"}, whole),
        ({"ChecksumSHA256": spelt, "ChecksumCRC32": "AAAAAA=="}, Checksum("crc32", "AAAAAA==")),
        ({"ChecksumSHA256": spelt, "ChecksumType": "COMPOSITE"}, None),
        ({"ChecksumSHA256": f"{spelt}-2"}, None),
        ({"ChecksumSHA256": "no base64"}, None),
    ):
        with Stubber(client) as stub:
            reply = {"ETag": '"e"', "ContentLength": 4, **told}
            stub.add_response("head_object", reply)
            (found,) = S3Source("s3://b/m/", client).describe([listed])
        assert found.checksum == promised


class HeedlessClient:
    """Of a store that gives the object there is, whatever If-Match asks for."""

    def get_object(self, **asked: str) -> dict[str, Any]:
        assert asked["IfMatch"] == '"old"'
        body = StreamingBody(HTTPResponse(io.BytesIO(b"abcd"), preload_content=False), 4)
        return {"Body": body, "ContentRange": "bytes 0-3/8", "ETag": '"new"'}


def test_an_object_replaced_between_its_ranges_is_refused_by_whoever_the_store_does_not_ask():
    source = S3Source("s3://bucket/model", HeedlessClient())
    file = SourceFile(name="model.safetensors", size=8, etag="old")
    with pytest.raises(InputChanged, match="ETag old became new"):
        source.open_range(file, 0, 4)
