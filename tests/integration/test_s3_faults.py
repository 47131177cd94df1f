import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from storage import keys
from storage.attempts import PART, claim_attempt
from storage.commits import bury
from storage.errors import (
    AccessDenied,
    AlreadyExists,
    CorruptObject,
    NotFound,
    PreconditionFailed,
    StoreUnavailable,
)
from storage.garbage import collect_garbage
from storage.lease import Leases
from storage.object_store import StorageConfig, open_store
from storage.probe import probe_store
from storage.s3_client import RetryPolicy, make_client
from storage.s3_store import S3Store
from storage.s3_transfer import S3Transfer
from tests.faults.fault_proxy import FOREVER, FaultProxy, Kind
from tests.seaweed import Seaweed

MiB = 1 << 20
QUICK = RetryPolicy(max_attempts=6, base_s=0.01, cap_s=0.1)


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.port) as proxy:
        yield proxy


@pytest.fixture
def store(seaweed: Seaweed, proxy: FaultProxy) -> Iterator[S3Store]:
    config = StorageConfig(endpoint_url=proxy.endpoint_url, region="us-east-1")
    client = make_client(config, read_timeout_s=1.0)
    yield S3Store(f"{seaweed.uri}/run", config, client=client, retry=QUICK)
    client.close()


def test_a_create_whose_reply_was_lost_is_known_as_ours(store: S3Store, proxy: FaultProxy) -> None:
    proxy.add("drop_after", match="^PUT .*/k")
    info = store.put_if_absent("k", b"nonce 1")
    assert proxy.count("^PUT .*/k") == 2
    assert store.head("k").etag == info.etag
    with pytest.raises(AlreadyExists):
        store.put_if_absent("k", b"nonce 2")
    assert store.get("k") == b"nonce 1"


def test_a_swap_whose_reply_was_lost_is_known_as_ours(store: S3Store, proxy: FaultProxy) -> None:
    etag = store.put("k", b"1").etag
    proxy.add("drop_after", match="^PUT .*/k")
    swapped = store.put_if_match("k", b"2", etag)
    assert swapped.etag == store.head("k").etag
    with pytest.raises(PreconditionFailed):
        store.put_if_match("k", b"3", etag)
    assert store.quotes_etags


@pytest.mark.parametrize(
    ("status", "code"),
    [(503, "SlowDown"), (409, "ConditionalRequestConflict"), (500, "InternalError"), (429, "Slow")],
)
def test_a_passing_refusal_is_waited_out(
    store: S3Store, proxy: FaultProxy, status: int, code: str
) -> None:
    for verb in ("PUT", "GET", "HEAD"):
        proxy.add("status", match=f"^{verb} ", count=2, status=status, code=code)
    store.put_if_absent("k", b"x")
    assert store.get("k") == b"x"
    assert store.head("k").size == 1
    assert [info.key for info in store.list()] == ["k"]
    assert proxy.pending() == 0


def test_a_store_that_stays_down_is_unavailable_and_worth_another_try(
    store: S3Store, proxy: FaultProxy
) -> None:
    proxy.add("drop_before", match="^PUT", count=100)
    with pytest.raises(StoreUnavailable) as caught:
        store.put("k", b"x")
    assert caught.value.retryable
    assert proxy.count("^PUT") == QUICK.max_attempts


def test_wrong_credentials_are_refused_at_once(
    seaweed: Seaweed, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    config = StorageConfig(endpoint_url=proxy.endpoint_url)
    with pytest.raises(AccessDenied, match="check the credentials"):
        S3Store(f"{seaweed.uri}/run", config).put("k", b"x")
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("size", [1000, 20 * MiB])
def test_one_flipped_bit_never_reaches_the_file(
    store: S3Store, proxy: FaultProxy, tmp_path: Path, size: int
) -> None:
    source, target = tmp_path / "source", tmp_path / "into" / "target"
    source.write_bytes(os.urandom(size))
    target.parent.mkdir()
    store.upload(source, "k")
    proxy.add("flip", match="^GET .*/k")
    store.download("k", target)
    assert target.read_bytes() == source.read_bytes()
    target.unlink()
    proxy.add("flip", match="^GET .*/k", count=100)
    with pytest.raises(CorruptObject, match="the store says crc64nvme:"):
        store.download("k", target)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("algorithm", ["SHA256", "CRC32"])
def test_a_flipped_bit_is_noticed_by_whatever_checksum_of_the_whole_the_store_keeps(
    seaweed: Seaweed, store: S3Store, proxy: FaultProxy, tmp_path: Path, algorithm: Any
) -> None:
    client = make_client(seaweed.config)
    client.put_object(
        Bucket=seaweed.bucket, Key="run/k", Body=b"x" * 1000, ChecksumAlgorithm=algorithm
    )
    client.close()
    store.download("k", tmp_path / "whole")
    proxy.add("flip", match="^GET .*/k", count=100)
    with pytest.raises(CorruptObject, match=f"the store says {algorithm.lower()}:"):
        store.download("k", tmp_path / "flipped")
    assert not (tmp_path / "flipped").exists()


def test_one_flipped_bit_in_an_object_read_whole_is_noticed(
    store: S3Store, proxy: FaultProxy
) -> None:
    store.put("k", b"x" * 1000)
    rule = proxy.add("flip", match="^GET .*/k", count=1)
    assert store.get("k") == b"x" * 1000
    rule.count = 100
    with pytest.raises(CorruptObject):
        store.get("k")


def test_cut_and_stalled_replies_are_asked_for_again(
    store: S3Store, proxy: FaultProxy, tmp_path: Path
) -> None:
    data = os.urandom(20 * MiB)
    (tmp_path / "source").write_bytes(data)
    store.upload(tmp_path / "source", "k")
    proxy.add("truncate", match="^GET .*/k", count=2)
    proxy.add("stall", match="^GET .*/k", count=1, seconds=3.0)
    store.download("k", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data
    assert proxy.pending() == 0
    proxy.add("truncate", match="^GET .*/k", count=1)
    assert store.get_range("k", 5, 4 * MiB) == data[5 : 4 * MiB]


def test_a_body_that_trickles_is_cut_off_and_asked_for_again_but_not_for_ever(
    seaweed: Seaweed, proxy: FaultProxy, tmp_path: Path
) -> None:
    config = StorageConfig(endpoint_url=proxy.endpoint_url, region="us-east-1")
    store = S3Store(f"{seaweed.uri}/run", config, retry=replace(QUICK, stall_s=1.0, patience_s=6.0))
    data = os.urandom(20 * MiB)
    (tmp_path / "source").write_bytes(data)
    store.upload(tmp_path / "source", "k")
    rule = proxy.add("trickle", match="^GET .*/k", count=3, seconds=600)
    store.download("k", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data
    assert store.get_range("k", 5, 4 * MiB) == data[5 : 4 * MiB]
    rule.count = FOREVER
    with pytest.raises(StoreUnavailable):
        store.get("k")


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_listing_or_a_copy_whose_reply_is_cut_short_is_asked_for_again(
    store: S3Store, proxy: FaultProxy, kept: float
) -> None:
    store.put("a/1", b"x")
    proxy.add("truncate", match="^GET .*list-type", kept=kept, count=2)
    assert [info.key for info in store.list("a/")] == ["a/1"], "cut is not empty"
    proxy.add("truncate", match="^PUT .*a/2", kept=kept, count=2)
    store.copy("a/1", "a/2")
    assert store.get("a/2") == b"x"
    proxy.add("truncate", match="^GET .*a/none", kept=kept, count=2)
    with pytest.raises(NotFound):
        store.get("a/none")
    assert proxy.pending() == 0


@pytest.mark.parametrize("kind", ["drop_before", "drop_after", "status"])
def test_the_probe_asks_again_when_the_store_does_not_answer(
    store: S3Store, proxy: FaultProxy, kind: Kind
) -> None:
    proxy.add(kind, match="^PUT .*/k")
    assert store.verifies_checksums("k")
    assert proxy.count("^PUT .*/k") == 2


def test_an_object_replaced_in_the_middle_of_a_download_is_refused(
    store: S3Store, seaweed: Seaweed, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(os.urandom(20 * MiB))
    (tmp_path / "into").mkdir()
    store.upload(tmp_path / "source", "k")
    writer = S3Store(store.uri, seaweed.config)

    def replace(**_: Any) -> None:
        client.meta.events.unregister("before-send.s3.GetObject", replace)
        writer.put("k", b"other")

    client = make_client(seaweed.config)
    client.meta.events.register("before-send.s3.GetObject", replace)
    reader = S3Store(store.uri, seaweed.config, client=client, retry=QUICK)
    with pytest.raises(PreconditionFailed):
        reader.download("k", tmp_path / "into" / "target")
    assert list((tmp_path / "into").iterdir()) == []


@pytest.mark.parametrize("size", [1000, 20 * MiB])
def test_an_upload_refused_after_its_body_was_taken_is_sent_again_whole(
    store: S3Store, proxy: FaultProxy, tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    proxy.add("status", match="^PUT", count=2)
    store.upload(tmp_path / "source", "k")
    assert proxy.pending() == 0
    assert store.get("k") == data


def test_a_multipart_upload_whose_last_reply_was_lost_is_whole(
    store: S3Store, proxy: FaultProxy, tmp_path: Path
) -> None:
    data = os.urandom(20 * MiB)
    (tmp_path / "source").write_bytes(data)
    proxy.add("drop_after", match="^POST .*uploadId=")
    store.upload(tmp_path / "source", "k")
    assert proxy.pending() == 0
    assert store.get("k") == data


def test_a_multipart_upload_that_fails_leaves_nothing(
    store: S3Store, proxy: FaultProxy, seaweed: Seaweed, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(bytes(20 * MiB))
    proxy.add("status", match="^PUT .*partNumber=2", count=100, status=500)
    with pytest.raises(StoreUnavailable):
        store.upload(tmp_path / "source", "k")
    assert list(store.list()) == []
    client = make_client(seaweed.config)
    assert client.list_multipart_uploads(Bucket=seaweed.bucket).get("Uploads", []) == []


def test_a_big_object_is_copied_in_parts(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Transfer, "copy_limit_bytes", 6 * MiB)
    monkeypatch.setattr(S3Transfer, "copy_part_bytes", 5 * MiB)
    data = os.urandom(13 * MiB)
    (tmp_path / "source").write_bytes(data)
    store.upload(tmp_path / "source", "día 1/big")
    assert store.copy("día 1/big", "copy").size == len(data)
    assert store.get("copy") == data


def test_collecting_garbage_aborts_uploads_of_attempts_that_cannot_become_real(
    seaweed: Seaweed,
) -> None:
    store = open_store(f"{seaweed.uri}/run", seaweed.config)
    dead, running = (claim_attempt(store, 0, "i", "h", revision=revision) for revision in (1, 2))
    client = make_client(seaweed.config)
    begun = {
        attempt: client.create_multipart_upload(
            Bucket=seaweed.bucket, Key=f"run/{keys.attempt(0, attempt, PART)}"
        )["UploadId"]
        for attempt in (dead, running)
    }
    bury(store, 0, plan_digest="sha256:plan", revision=1, reason="cancelled", holder="ops")
    assert collect_garbage(store).num_swept == 1
    left = client.list_multipart_uploads(Bucket=seaweed.bucket)["Uploads"]
    assert [upload["UploadId"] for upload in left] == [begun[running]]
    client.close()


def test_a_listing_does_not_stop_at_a_thousand_objects(seaweed: Seaweed) -> None:
    store = S3Store(f"{seaweed.uri}/g1", seaweed.config)
    names = [f"part-{number:05d}.jsonl" for number in range(1203)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(name, b"{}"), names))
    assert [info.key for info in store.list()] == names
    assert [info.key for info in store.list("part-011")] == names[1100:1200]


def test_keys_reach_the_bucket_exactly_and_come_from_it_exactly(seaweed: Seaweed) -> None:
    keys = [
        "in put/My Data=1/part 0.parquet",
        "in put/dónde/パート.parquet",
        "in put/a=b/c:d.parquet",
    ]
    client = boto3.client("s3", endpoint_url=seaweed.endpoint_url)
    for key in keys:
        client.put_object(Bucket=seaweed.bucket, Key=key, Body=key.encode())
    source = open_store(f"{seaweed.uri}/in put", seaweed.config)
    found = {info.key: source.get(info.key).decode() for info in source.list()}
    assert sorted(f"in put/{key}" for key in found) == sorted(found.values()) == sorted(keys)
    open_store(f"{seaweed.uri}/out put/día 1", seaweed.config).put("completions/a b.parquet", b"x")
    listed = client.list_objects_v2(Bucket=seaweed.bucket, Prefix="out put/día 1/")["Contents"]
    assert [item["Key"] for item in listed] == ["out put/día 1/completions/a b.parquet"]
    client.close()


def test_the_probe_finds_a_real_server_fit(seaweed: Seaweed) -> None:
    store = open_store(f"{seaweed.uri}/run", seaweed.config)
    found = probe_store(store)
    assert found.is_fit
    assert found.faults == []
    assert found.quotes_etags
    assert found.verifies_checksums
    assert found.keeps_full_checksum
    assert found.lists_in_byte_order is False
    assert abs(found.clock_skew_s) < 5
    assert list(store.list()) == []


def test_a_lease_on_a_real_server_passes_from_hand_to_hand(seaweed: Seaweed) -> None:
    store = open_store(f"{seaweed.uri}/run", seaweed.config)
    a, b = (Leases(store, holder=name, ttl_s=60) for name in "ab")
    lease = a.acquire(0)
    assert lease is not None
    assert b.acquire(0) is None
    a.release(a.renew(lease))
    taken = b.acquire(0)
    assert taken is not None
    assert taken.fencing_token == 2
    short = Leases(store, holder="c", ttl_s=0.0)
    assert short.acquire(1) is not None
    # The store tells times in whole seconds: a lease may seem to last up to one longer.
    deadline = time.monotonic() + 5
    while (second := b.acquire(1)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert second is not None
    assert second.fencing_token == 2
