import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from storage.clock import FrozenClock
from storage.errors import BadInput, StorageError
from storage.local_store import LocalStore
from storage.memory_store import MemoryStore
from storage.object_store import StorageConfig, open_store
from storage.s3_client import RetryPolicy
from storage.s3_store import S3Store, make_client
from tests.moto_in_turn import moto_in_turn
from tests.object_store_contract import ObjectStoreContract


@pytest.fixture(scope="module")
def moto_bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, moto_in_turn():
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="unit")
        yield "unit"


@pytest.fixture(scope="module")
def moto_client(moto_bucket: str) -> Any:
    return make_client()


class TestMemoryStore(ObjectStoreContract):
    @pytest.fixture
    def store(self, memory_store: MemoryStore) -> MemoryStore:
        return memory_store


class TestLocalStore(ObjectStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path / "store")


class TestS3StoreOnMoto(ObjectStoreContract):
    @pytest.fixture
    def store(self, moto_bucket: str, moto_client: Any) -> S3Store:
        uri = f"s3://{moto_bucket}/día 1/{secrets.token_hex(4)}"
        return S3Store(uri, client=moto_client, retry=RetryPolicy(base_s=0.001, cap_s=0.01))


def test_a_uri_opens_the_store_it_names(tmp_path: Path, moto_bucket: str) -> None:
    spaced = tmp_path / "a folder"
    for uri, kind, shown in (
        (str(tmp_path), LocalStore, str(tmp_path)),
        (f"{tmp_path}/", LocalStore, str(tmp_path)),
        (spaced.as_uri(), LocalStore, str(spaced)),
        (f"s3://{moto_bucket}/results/", S3Store, f"s3://{moto_bucket}/results"),
        (f"s3://{moto_bucket}", S3Store, f"s3://{moto_bucket}"),
        ("memory://uris/run", MemoryStore, "memory://uris/run"),
    ):
        store = open_store(uri)
        assert isinstance(store, kind)
        assert store.uri == shown
        store.put("k", uri.encode())
        assert open_store(store.uri).get("k") == uri.encode()


def test_a_store_opened_at_a_prefix_sees_the_same_objects_under_shorter_keys(
    tmp_path: Path, moto_bucket: str
) -> None:
    for uri in (str(tmp_path), f"s3://{moto_bucket}", "memory://prefixes"):
        open_store(f"{uri}/outer/inner").put("k", b"x")
        assert [info.key for info in open_store(f"{uri}/outer").list()] == ["inner/k"]
        assert list(open_store(f"{uri}/out").list()) == []


def test_an_unknown_scheme_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="gs://bucket: unknown scheme"):
        open_store("gs://bucket")
    with pytest.raises(StorageError, match="not an S3 location"):
        open_store("s3:///key", StorageConfig(endpoint_url="http://127.0.0.1:9"))


def test_a_memory_store_without_a_name_shares_nothing(frozen_clock: FrozenClock) -> None:
    MemoryStore(clock=frozen_clock).put("k", b"x")
    assert list(MemoryStore(clock=frozen_clock).list()) == []


def test_opening_a_store_writes_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "later"))
    assert list(store.list()) == []
    assert not os.path.exists(tmp_path / "later")


def test_the_protocol_imports_no_s3_library_until_an_s3_store_is_opened() -> None:
    script = (
        "import sys, storage.commits, storage.garbage, storage.lease, storage.probe, storage.reveal\n"
        "from storage.object_store import open_store\n"
        "open_store('memory://x'); open_store('somewhere')\n"
        "sys.exit('boto3' in sys.modules)"
    )
    repository = Path(__file__).parents[2]
    assert (
        subprocess.run([sys.executable, "-c", script], cwd=repository, check=False).returncode == 0
    )
