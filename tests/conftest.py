"""Doubles that ship with the product, and a real S3 server, for every test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.clock import FrozenClock
from storage.memory_store import MemoryStore
from tests.prefect_server import PrefectLab, running_prefect
from tests.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed, make_bucket, running_seaweed

if not Path("/dev/nvidiactl").exists():
    # Read by Triton when it is first imported, and some test's libraries import it: kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def frozen_clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
def memory_store(frozen_clock: FrozenClock) -> MemoryStore:
    return MemoryStore(clock=frozen_clock)


@pytest.fixture(scope="session")
def seaweed_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The S3 port of a server that lives as long as the test session; started when first needed."""
    with running_seaweed(tmp_path_factory.mktemp("seaweed")) as port:
        yield port


@pytest.fixture
def seaweed(seaweed_port: int, monkeypatch: pytest.MonkeyPatch) -> Seaweed:
    """A fresh bucket on a real S3 server, with the credentials in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    return Seaweed(port=seaweed_port, bucket=make_bucket(seaweed_port))


@pytest.fixture(scope="session")
def prefect_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectLab]:
    """A Prefect server with our pool, deployments and one worker; started when first needed."""
    with running_prefect(tmp_path_factory.mktemp("prefect")) as lab:
        lab.start_worker()
        yield lab
