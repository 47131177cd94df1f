"""Races of the commit protocol alone: cheap processes, so that thousands of kills and faults fit in an hour.

Three workers at a time (`commit_worker`) race for every shard and redo some, killed between any two
durable steps. A watcher with a clean connection looks on; afterwards the run is finished as the next
start would, garbage is collected, and every row is counted. A planted bug must be caught by that.
"""

import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from storage.commits import CommitCache, all_commits, read_commits
from storage.garbage import collect_garbage
from storage.manifest import RunManifest, digest
from storage.object_store import ObjectStore
from storage.reveal import manifest_part, publish, read_manifest, reveal, unrevealed
from tests.faults.commit_worker import PLAN
from tests.faults.fault_proxy import FOREVER, FaultProxy
from tests.faults.forked import Child, Forks
from tests.faults.lives import LOCAL, Tally
from tests.faults.store_checks import Watcher

NUM_SHARDS, NUM_ROWS, NUM_WORKERS = 8, 5, 3
TIME_LIMIT_S, BUG_TIME_LIMIT_S = 1_200.0, 60.0
FAILPOINTS = {
    "after_claim": 0.05,
    "after_data": 0.12,
    "before_commit": 0.05,
    "after_commit": 0.12,
    "after_copy": 0.08,
    "after_reveal": 0.05,
    **dict.fromkeys(LOCAL, 0.02),
}
BUGS = (
    "unconditional commit",
    "shared data key",
    "commit before data",
    "refusal taken as loss",
)


@dataclass
class Race:
    """One run of the protocol, until every shard is committed or something is wrong."""

    store: ObjectStore
    endpoint_url: str
    forks: Forks
    seed: int
    tally: Tally
    variant: str = "right"
    deadliness: float = 1.0
    """Times the chances of `FAILPOINTS`."""

    num_started: int = 0
    told: list[tuple[str, ...]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    is_done: bool = False
    """Every shard is committed."""

    def run(self) -> list[str]:
        """Run it to its end; return what is wrong."""
        every_s = 0.05 if self.variant != "right" else 1.0 if self.endpoint_url else 0.2
        with Watcher(self.store, every_s) as watcher:
            self._work(watcher)
        if not self.wrong and not watcher.wrong and self.is_done:
            self.wrong += self._check()
            watcher.look_at_everything()
        self.wrong += watcher.wrong
        self.tally.lives += 1
        return [f"{self.store.uri}: {what}" for what in self.wrong]

    def _work(self, watcher: Watcher) -> None:
        limit_s = TIME_LIMIT_S if self.variant == "right" else BUG_TIME_LIMIT_S
        deadline = time.monotonic() + limit_s
        workers: list[Child] = []
        cache: CommitCache = {}
        try:
            while not self.wrong and not watcher.wrong:
                workers = [worker for worker in workers if not self._is_over(worker)]
                standing = read_commits(self.store, PLAN, cache=cache).current
                self.is_done = len(standing) == NUM_SHARDS
                if self.is_done and not workers:
                    return
                while len(workers) < NUM_WORKERS and not self.is_done:
                    workers.append(self._start())
                if time.monotonic() > deadline:
                    if self.variant == "right":  # to be slow is not to be caught
                        self.wrong.append(f"not finished after {limit_s:.0f} s")
                    return
                time.sleep(0.2)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()

    def _start(self) -> Child:
        self.num_started += 1
        self.tally.started += 1
        seed = self.seed * 1000 + self.num_started
        points = ",".join(
            f"{name}:kill:{chance * self.deadliness}:{seed}" for name, chance in FAILPOINTS.items()
        )
        arguments = [self.store.uri, self.endpoint_url, NUM_SHARDS, NUM_ROWS, seed, self.variant]
        return self.forks.start(["commit-worker", *arguments], failpoint=points)

    def _is_over(self, worker: Child) -> bool:
        if worker.poll() is None:
            return False
        lines = worker.log.read_text().splitlines()
        self.told += [words for line in lines if (words := tuple(line.split()))[-1:] in _TOLD]
        if worker.status == -signal.SIGKILL:
            self.tally.kills["in a race"] += 1
        elif worker.status and self._must_not_fail(worker):
            self.wrong.append(f"worker failed: {worker.said()}")
        return True

    def _must_not_fail(self, worker: Child) -> bool:
        """A planted bug is to be seen in the store; a store that was away too long is no fault."""
        return self.variant == "right" and "StoreUnavailable" not in worker.said()

    def _check(self) -> list[str]:
        wrong = self._wrongly_told()
        try:
            rows = finish(self.store)
        except AssertionError as error:  # what has to hold when a run ends does not
            return [*wrong, str(error)]
        if sorted(rows) != list(range(NUM_SHARDS * NUM_ROWS)):
            wrong.append(f"rows are {sorted(rows)}")
        self.tally.rows += len(rows)
        standing = list(all_commits(self.store))
        self.tally.commits += len(standing)
        self.tally.redone += sum(record.revision > 1 for record in standing)
        return wrong

    def _wrongly_told(self) -> list[str]:
        standing = {
            (str(record.shard_id), str(record.revision)): record.nonce
            for record in all_commits(self.store)
        }
        return [
            f"shard {shard_id} revision {revision}: wrongly told {outcome}"
            for shard_id, revision, nonce, outcome in self.told
            if (standing[shard_id, revision] == nonce) != (outcome == "won")
        ]


_TOLD = (("won",), ("lost",))


def finish(store: ObjectStore) -> list[int]:
    """Reveal and publish as the next start would, collect garbage, and return every row."""
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
    assert publish(store, manifest).won, "publish: another manifest is there"
    collect_garbage(store)
    assert read_manifest(store) == manifest, "manifest: not what was published"
    for part in manifest.parts:
        key = part["key"]
        assert digest(store.get(key)) == part["sha256"], f"part: {key} is not what was committed"
    return [row["row"] for part in manifest.parts for row in json.loads(store.get(part["key"]))]


def seconds_until_caught(
    bug: str,
    open_run: Callable[[str], ObjectStore],
    proxy: FaultProxy,
    forks: Forks,
    rng: random.Random,
) -> tuple[float, str]:
    """Race with a planted bug until a check fails; return how long it took, and what was said.

    The first reply to each commit is lost, beside whatever else the proxy does.

    Raises:
        AssertionError: nobody noticed within a minute.
    """
    began = time.monotonic()
    proxy.add("drop_after", "^PUT .*commits/", count=FOREVER, once_each=True)
    number = 0
    while time.monotonic() < began + 60:
        number += 1
        race = Race(
            open_run(f"{bug} {number}"), proxy.endpoint_url, forks, rng.randrange(1 << 20), Tally()
        )
        race.variant = bug
        if wrong := race.run():
            return time.monotonic() - began, wrong[0]
    raise AssertionError(f"planted bug {bug!r} was not caught within a minute")
