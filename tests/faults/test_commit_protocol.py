"""Real processes, real kills, a lossy network, a real S3 server: what stands is read from the store.

The short form of `python -m tests.faults.campaign`; what is raced and checked is in `races`.
"""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import keys
from storage.object_store import open_store
from tests.faults.fault_proxy import Dice, FaultProxy
from tests.faults.forked import Forks
from tests.faults.lives import Tally
from tests.faults.races import BUGS, NUM_SHARDS, Race, seconds_until_caught
from tests.seaweed import Seaweed


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.port, dice=Dice(0.2, seed=1, stall_s=0.5)) as proxy:
        yield proxy


def test_kills_and_a_lossy_network_lose_and_repeat_nothing(
    seaweed: Seaweed, proxy: FaultProxy, forks: Forks
) -> None:
    store = open_store(f"{seaweed.uri}/run", seaweed.config)
    tally = Tally()
    assert Race(store, proxy.endpoint_url, forks, 1, tally).run() == []
    assert tally.num_kills >= 3
    assert sum(proxy.injected.values()) >= 20


def test_kills_on_a_local_folder_lose_and_repeat_nothing(tmp_path: Path, forks: Forks) -> None:
    store = open_store(str(tmp_path))
    tally = Tally()
    assert Race(store, "", forks, 2, tally).run() == []
    assert tally.num_kills >= 3
    attempts = Counter(keys.parse_attempt(info.key) for info in store.list(keys.ATTEMPTS))
    assert len(attempts) >= NUM_SHARDS
    assert list(tmp_path.rglob(".nj-*")) == [tmp_path / ".nj-lock"]


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_within_a_minute(
    seaweed: Seaweed, proxy: FaultProxy, forks: Forks, bug: str
) -> None:
    seconds, what = seconds_until_caught(
        bug,
        lambda name: open_store(f"{seaweed.uri}/{name}", seaweed.config),
        proxy,
        forks,
        random.Random(3),
    )
    print(f"{bug}: caught after {seconds:.1f} s: {what}")
