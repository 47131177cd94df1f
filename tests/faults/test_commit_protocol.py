"""Real processes, real kills, a lossy network, a real S3 server: what stands is read from the store.

Three workers at a time race for every shard and redo some. Failpoints SIGKILL them between any two
durable steps; the proxy drops requests and replies and answers 409 and 5xx. A watcher with its own
clean connection checks all the while that commits never change and that their data is there.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from storage import keys
from storage.commits import all_commits, read_commits
from storage.errors import NotFound
from storage.failpoints import VARIABLE
from storage.garbage import collect_garbage
from storage.manifest import RunManifest, digest
from storage.object_store import ObjectStore, open_store
from storage.reveal import manifest_part, publish, read_manifest, reveal, unrevealed
from tests.faults.fault_proxy import FaultProxy
from tests.seaweed import Seaweed

REPOSITORY = Path(__file__).parents[2]
PLAN = "sha256:plan"
NUM_SHARDS, NUM_ROWS, NUM_WORKERS = 8, 5, 3
TIME_LIMIT_S = 60.0
FAILPOINTS = {
    "after_claim": 0.05,
    "after_data": 0.12,
    "before_commit": 0.05,
    "after_commit": 0.12,
    "after_copy": 0.08,
    "after_reveal": 0.05,
    "local_before_link": 0.02,
    "local_after_link": 0.02,
    "local_before_rename": 0.02,
    "local_after_rename": 0.02,
}


@dataclass
class Campaign:
    """Runs workers until every shard is committed; collects what must not happen."""

    store: ObjectStore
    endpoint_url: str
    variant: str
    seed: int
    faults: list[str] = field(default_factory=list)
    num_started: int = 0
    num_killed: int = 0
    told: list[tuple[str, ...]] = field(default_factory=list)

    def run(self) -> None:
        deadline = time.monotonic() + TIME_LIMIT_S
        stop = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stop,))
        watcher.start()
        try:
            self._work(deadline)
        finally:
            stop.set()
            watcher.join()
        self._check_what_was_told()

    def _work(self, deadline: float) -> None:
        workers: list[subprocess.Popen[str]] = []
        try:
            while not self.faults and time.monotonic() < deadline:
                workers = [worker for worker in workers if not self._is_over(worker)]
                is_done = len(read_commits(self.store, PLAN).current) == NUM_SHARDS
                if is_done and not workers:
                    return
                while len(workers) < NUM_WORKERS and not is_done:
                    workers.append(self._start())
                time.sleep(0.05)
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
        assert self.faults, f"not finished after {TIME_LIMIT_S:.0f} s"

    def _start(self) -> subprocess.Popen[str]:
        self.num_started += 1
        seed = self.seed * 1000 + self.num_started
        points = ",".join(f"{name}:kill:{chance}:{seed}" for name, chance in FAILPOINTS.items())
        arguments = [self.store.uri, self.endpoint_url, NUM_SHARDS, NUM_ROWS, seed, self.variant]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.commit_worker", *map(str, arguments)],
            env={**os.environ, VARIABLE: points},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _is_over(self, worker: subprocess.Popen[str]) -> bool:
        if worker.poll() is None:
            return False
        output, complaint = worker.communicate()
        self.told += [tuple(line.split()) for line in output.splitlines()]
        self.num_killed += worker.returncode == -signal.SIGKILL
        if worker.returncode not in (0, -signal.SIGKILL):
            self.faults.append(f"worker failed: {complaint[-500:]}")
        return True

    def _watch(self, stop: threading.Event) -> None:
        seen: dict[str, bytes] = {}
        while not stop.wait(0.02):
            for info in self.store.list(keys.COMMITS):
                data = self.store.get(info.key)
                if seen.setdefault(info.key, data) != data:
                    self.faults.append(f"{info.key} changed")
                part = json.loads(data)["part"]
                try:
                    if digest(self.store.get(part["key"])) != part["sha256"]:
                        self.faults.append(f"{info.key}: its data is not what it promises")
                except NotFound:
                    self.faults.append(f"{info.key}: its data is not there")

    def _check_what_was_told(self) -> None:
        standing = {
            (str(record.shard_id), str(record.revision)): record.nonce
            for record in all_commits(self.store)
        }
        for shard_id, revision, nonce, outcome in self.told:
            if (standing[shard_id, revision] == nonce) != (outcome == "won"):
                self.faults.append(f"shard {shard_id} revision {revision}: wrongly told {outcome}")


def finish(store: ObjectStore) -> list[int]:
    """Reveal and publish as the next invocation would, collect garbage, and return every row."""
    current = read_commits(store, PLAN).current
    for record in unrevealed(store, current.values()):
        reveal(store, record)
    manifest = RunManifest(
        run_id="run",
        revision=1,
        fingerprint="f",
        plan_digest=PLAN,
        num_shards=NUM_SHARDS,
        num_rows=NUM_SHARDS * NUM_ROWS,
        counts={"ok": NUM_SHARDS * NUM_ROWS},
        num_prompt_tokens=0,
        num_completion_tokens=0,
        parts=[manifest_part(record) for record in current.values()],
        totals={},
        published_at="2026-11-25T00:00:00Z",
    )
    assert publish(store, manifest).won
    collect_garbage(store)
    assert read_manifest(store) == manifest
    for part in manifest.parts:
        assert digest(store.get(part["key"])) == part["sha256"]
    return [row["row"] for part in manifest.parts for row in json.loads(store.get(part["key"]))]


def make_trouble(proxy: FaultProxy, seed: int, stop: threading.Event) -> None:
    rng = random.Random(seed)
    while not stop.wait(0.02):
        if proxy.pending() < 2:
            proxy.add(
                rng.choice(["drop_after", "drop_after", "drop_before", "status"]),
                match=rng.choice(["^PUT", "^PUT .*commits", "^GET", "^PUT .*_attempts"]),
                status=rng.choice([500, 503, 409]),
            )


def campaign_on(seaweed: Seaweed, variant: str, seed: int) -> Campaign:
    store = open_store(f"{seaweed.uri}/run", seaweed.config)
    with FaultProxy(seaweed.port) as proxy:
        stop = threading.Event()
        trouble = threading.Thread(target=make_trouble, args=(proxy, seed, stop))
        trouble.start()
        campaign = Campaign(store, proxy.endpoint_url, variant, seed)
        try:
            campaign.run()
        finally:
            stop.set()
            trouble.join()
    return campaign


@pytest.mark.slow
def test_kills_and_a_lossy_network_lose_and_repeat_nothing(seaweed: Seaweed) -> None:
    campaign = campaign_on(seaweed, "right", seed=1)
    assert campaign.faults == []
    assert campaign.num_killed >= 3
    assert sorted(finish(campaign.store)) == list(range(NUM_SHARDS * NUM_ROWS))


def test_kills_on_a_local_folder_lose_and_repeat_nothing(tmp_path: Path) -> None:
    campaign = Campaign(open_store(str(tmp_path)), "", "right", seed=2)
    campaign.run()
    assert campaign.faults == []
    assert campaign.num_killed >= 3
    assert sorted(finish(campaign.store)) == list(range(NUM_SHARDS * NUM_ROWS))
    attempts = Counter(keys.parse_attempt(info.key) for info in campaign.store.list(keys.ATTEMPTS))
    assert len(attempts) >= NUM_SHARDS
    assert list(tmp_path.rglob(".nj-*")) == [tmp_path / ".nj-lock"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["unconditional commit", "shared data key", "commit before data"]
)
def test_a_planted_bug_is_caught(seaweed: Seaweed, variant: str) -> None:
    assert campaign_on(seaweed, variant, seed=3).faults != []
