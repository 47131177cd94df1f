"""What the stores of the test suite do is what was recorded of them, and the recorded runs were whole."""

import json
from pathlib import Path

import boto3
import pytest

from storage.s3_client import make_client
from storage.s3_store import S3Store
from tests.conformance import capabilities
from tests.moto_in_turn import moto_in_turn
from tests.object_store_contract import ObjectStoreContract
from tests.seaweed import Seaweed

RECORDED = Path(__file__).parents[1] / "data" / "conformance"
CONTRACT = {name.removeprefix("test_") for name in dir(ObjectStoreContract) if name[:5] == "test_"}


def test_a_real_server_does_what_was_recorded_of_it(seaweed: Seaweed) -> None:
    store = S3Store(f"{seaweed.uri}/conformance", seaweed.config)
    recorded = json.loads((RECORDED / "seaweedfs_4.48.json").read_text())
    assert capabilities(store) == recorded["probe"]


def test_the_double_is_weaker_than_a_real_server_and_it_is_known_where(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with moto_in_turn():
        client = make_client()
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="conformance")
        found = capabilities(S3Store("s3://conformance/x", client=client))
    assert found == json.loads((RECORDED / "moto.json").read_text())["probe"]


@pytest.mark.parametrize("name", ["seaweedfs_4.48", "ceph_rgw_16.2.15"])
def test_a_recorded_store_passed_the_whole_contract(name: str) -> None:
    outcomes = json.loads((RECORDED / f"{name}.json").read_text())["contract"]
    assert set(outcomes.values()) == {"passed"}
    assert {test.partition("[")[0] for test in outcomes} == CONTRACT
