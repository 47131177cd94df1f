"""Doubles that ship with the product, and a real S3 server, for every test."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.clock import FrozenClock
from storage.memory_store import MemoryStore
from tests.prefect_server import PrefectLab, running_prefect
from tests.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed, make_bucket, running_seaweed

_ON_PREFECT = {f"tests/integration/test_prefect_{name}.py" for name in ("deployment", "waves")}
_num_modules = 0
"""When the garbage collector was last spared some."""

if not Path("/dev/nvidiactl").exists():
    # Read by Triton when it is first imported, and some test's libraries import it: kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup() -> None:
    """Spare the garbage collector what has been imported, whenever much has.

    With all test files and their libraries imported a collection takes half a second, and closing an engine is one.
    What a test makes is collected as ever.
    """
    global _num_modules
    if len(sys.modules) > _num_modules + 100:
        _num_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that share a Prefect server run in one process: two would start one each, in half a minute each."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class FilesByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "prefect" if file in _ON_PREFECT else file

    return FilesByServer(config, log)
