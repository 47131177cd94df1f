"""The store contract against any S3 endpoint that the environment names; see `tests/conformance.py`."""

import os
import secrets
from collections.abc import Iterator

import pytest

from storage.object_store import StorageConfig
from storage.s3_client import make_client
from storage.s3_store import S3Store
from tests.object_store_contract import ObjectStoreContract

ENDPOINT = os.environ.get("NIGHTJAR_TEST_ENDPOINT")
BUCKET = os.environ.get("NIGHTJAR_TEST_BUCKET", "")


@pytest.mark.skipif(not ENDPOINT, reason="NIGHTJAR_TEST_ENDPOINT names no store")
class TestGivenStore(ObjectStoreContract):
    @pytest.fixture
    def store(self) -> Iterator[S3Store]:
        config = StorageConfig(endpoint_url=ENDPOINT)
        client = make_client(config)
        yield S3Store(f"s3://{BUCKET}/{secrets.token_hex(6)}", config, client=client)
        client.close()
