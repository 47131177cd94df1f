import pytest

from storage.s3_client import RetryPolicy
from storage.s3_store import S3Store
from tests.object_store_contract import ObjectStoreContract
from tests.seaweed import Seaweed


class TestS3StoreOnSeaweed(ObjectStoreContract):
    @pytest.fixture
    def store(self, seaweed: Seaweed) -> S3Store:
        return S3Store(
            f"{seaweed.uri}/out put/día 1", seaweed.config, retry=RetryPolicy(base_s=0.02)
        )
