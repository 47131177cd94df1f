"""The whole life of a run under kills: plan, claim, write, commit, reveal, publish, retry, collect.

A life is one run of some shards. Up to three `nightjar` commands work on it at once, without knowing of each
other; most die by a SIGKILL of their own at a failpoint, the others at a random moment. What is started
next depends on what the store holds, so every step of a life gets its share of kills. Beside them a thief
breaks leases, and clocks are wrong. Then a last start, unharmed, must find everything.
"""

import dataclasses
import json
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from storage import keys
from storage.commits import CommitCache, current_commits
from storage.errors import StorageError, StoreUnavailable
from storage.object_store import ObjectStore, StorageConfig, open_store
from storage.reveal import read_manifest
from tasks.verify import verify_run
from tests.faults.forked import Child, Forks
from tests.faults.store_checks import Watcher, check_run, digest_of

LOCAL = ("local_before_link", "local_after_link", "local_before_rename", "local_after_rename")
SHARD = ("after_lease", "after_claim", "after_data", "before_commit", "after_commit")
SHARD += ("before_reveal", "after_copy", "after_reveal")
STEPS = {
    "plan": ("after_record", "after_plan_table", "after_plan"),
    "shards": SHARD,
    "publish": ("before_reveal", "after_copy", "after_reveal", "before_publish", "after_publish"),
    "retry": (*SHARD, "before_publish", "after_publish"),
    "collect": ("after_delete",),
}
BUDGET = {"plan": 4, "shards": 14, "publish": 4, "retry": 10, "collect": 3}
"""Kills a life may take, by stage; afterwards the stage is gone through unharmed."""

_AT_ONCE = 3
LIFE_S = 1_800.0  # on a machine that is busy with much else


@dataclass
class Tally:
    """What a campaign did, over all its lives."""

    lives: int = 0
    started: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """By failpoint; `anywhere` are those at a random moment."""

    rows: int = 0
    commits: int = 0
    redone: int = 0
    thefts: int = 0
    skewed: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        return sum(self.kills.values())

    def as_document(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "kills": dict(self.kills.most_common())}


@dataclass(kw_only=True)
class Life:
    """One run, from nothing to collected garbage."""

    forks: Forks
    job: Path
    out: str
    """Where its run folder appears."""

    direct: StorageConfig
    """How to reach the store past the faults."""

    endpoint_url: str | None
    rng: random.Random
    tally: Tally
    reference: pa.Table
    folder: Path
    budget: dict[str, float] = field(default_factory=lambda: dict(BUDGET))
    skew_s: float = 0.0
    """Most by which a clock may be wrong."""

    refusal: str = "-"
    """What a command may end with instead of 0, 3 and death: a store that was away."""

    _commits: CommitCache = field(default_factory=dict)

    _running: list["Started"] = field(default_factory=list)
    _store: ObjectStore | None = None
    _is_collected: bool = False

    def live(self) -> None:
        """Live it; what is wrong is added to the tally."""
        deadline = time.monotonic() + LIFE_S
        try:
            while self._store is None and self._goes_on(deadline):
                self._turn("plan")
                self._store = self._find()
            if self._store is None:
                return
            with Watcher(self._store, 0.1 if self.endpoint_url is None else 0.5) as watcher:
                while (stage := self._stage(self._store)) and self._goes_on(deadline):
                    self._turn(stage)
                    self._steal(self._store)
                self._end_all()
            if not self.tally.wrong:
                self._check(self._store)
                watcher.look_at_everything()
            self._wrong(*watcher.wrong)
        finally:
            self._end_all()
            self.tally.lives += 1

    def _goes_on(self, deadline: float) -> bool:
        if time.monotonic() > deadline:
            self._wrong(f"{self.out}: not over after {LIFE_S:g} s")
        return not self.tally.wrong

    def _stage(self, store: ObjectStore) -> str | None:
        """What the store lacks next; None when it lacks nothing."""
        try:
            return self._lacks(store)
        except StoreUnavailable:
            return "shards"  # the store is away: whoever is started waits for it

    def _lacks(self, store: ObjectStore) -> str | None:
        plan = json.loads(store.get(keys.PLAN))
        commits = current_commits(store, digest_of(store.get(keys.PLAN)), cache=self._commits)
        if len(commits) < plan["num_shards"]:
            return "shards"
        manifest = read_manifest(store)
        parts = {part["shard_id"]: part["revision"] for part in manifest.parts} if manifest else {}
        if parts != {shard_id: record.revision for shard_id, record in commits.items()}:
            return "publish"
        if any(record.counts.get("engine_error") for record in commits.values()):
            return "retry"
        return None if self._is_collected else "collect"

    def _turn(self, stage: str) -> None:
        """Start what there is room for, kill at random, see who ended."""
        is_calm = self.budget[stage] <= 0
        if len(self._running) < (1 if is_calm else _AT_ONCE):
            self._start(stage, is_calm)
        for started in list(self._running):
            if started.kills_at == "anywhere" and self.rng.random() < 0.03:
                started.child.kill()
            if started.child.poll() is not None:
                self._running.remove(started)
                self._ended(started)
        time.sleep(0.01)

    def _start(self, stage: str, is_calm: bool) -> None:
        rng = self.rng
        kills_at = "" if is_calm else self._failpoint(stage)
        chance = 0.2 if kills_at in LOCAL else rng.choice([0.3, 1.0])
        armed = f"{kills_at}:kill:{chance}:{rng.randrange(1 << 30)}"
        skew_s = rng.uniform(-self.skew_s, self.skew_s) if rng.random() < 0.3 else 0.0
        argv = self._command(stage, is_calm)
        child = self.forks.start(
            argv,
            failpoint=armed if kills_at not in ("", "anywhere") else "",
            skew_s=skew_s,
            moody=stage in ("plan", "shards"),
        )
        self.tally.started += 1
        self.tally.skewed += bool(skew_s)
        self._running.append(Started(child, argv[0], stage, kills_at))

    def _failpoint(self, stage: str) -> str:
        rng = self.rng
        if rng.random() < 0.15:
            return "anywhere"
        if self.endpoint_url is None and rng.random() < 0.2:
            return rng.choice(LOCAL)
        return rng.choice(STEPS[stage])

    def _command(self, stage: str, is_calm: bool) -> list[str]:
        endpoint = ["--endpoint-url", self.endpoint_url] if self.endpoint_url else []
        if self._store is None:
            return ["run", str(self.job), "--json"]
        if stage == "collect" or (not is_calm and self.rng.random() < 0.05):
            return ["gc", self._store.uri, *endpoint]
        if stage == "retry":
            return ["retry", self._store.uri, *endpoint, "--json"]
        if stage == "shards" and not is_calm and self.rng.random() < 0.5:
            return ["drain", self._store.uri, *endpoint, "--json"]
        return ["run", str(self.job), "--json"]

    def _ended(self, started: "Started") -> None:
        status = started.child.status
        if status == -signal.SIGKILL:
            self.tally.kills[started.kills_at] += 1
            self.budget[started.stage] -= 1
        elif status not in (0, 3) and self.refusal not in started.child.said():
            self._wrong(
                f"{self.out}: {started.name} ended with {status} in {started.stage}: "
                f"{started.child.said()}"
            )
        else:
            self.budget[started.stage] -= 0.25  # what is never passed kills nobody
            is_gc = (started.name, started.stage) == ("gc", "collect")
            self._is_collected |= is_gc and status == 0

    def _steal(self, store: ObjectStore) -> None:
        """Now and then break a lease: nothing may rest on it."""
        if self.rng.random() > 0.02:
            return
        with suppress(StorageError):
            found = [info.key for info in store.list(keys.LEASES) if info.key.endswith(".json")]
            if not found:
                return
            key = self.rng.choice(found)
            loot = {"format": 1, "holder": "elsewhere", "fencing_token": 99, "ttl_s": 0.5}
            match self.rng.randrange(3):
                case 0:
                    store.delete(key)
                case 1:
                    store.put(key, b"{")
                case 2:
                    store.put(key, json.dumps(loot).encode())
            self.tally.thefts += 1

    def _check(self, store: ObjectStore) -> None:
        wrong, table = check_run(store, self.reference.num_rows)
        self._wrong(*(f"{store.uri}: {what}" for what in wrong))
        found = verify_run(store, self.folder)
        if not found.is_whole:
            self._wrong(f"{store.uri}: verify: {found.violations} {found.missing_shards}")
        if not table.drop_columns(["attempt"]).equals(self.reference):
            self._wrong(f"{store.uri}: other rows than an undisturbed run's")
        self.tally.rows += table.num_rows
        revisions = [keys.parse_commit(info.key) for info in store.list(keys.COMMITS)]
        self.tally.commits += len(revisions)
        self.tally.redone += sum(place is not None and place.revision > 1 for place in revisions)

    def _find(self) -> ObjectStore | None:
        """The run below `out`, once it is planned."""
        with suppress(StorageError):
            for info in open_store(self.out, self.direct).list():
                if info.key.endswith(f"/{keys.PLAN}"):
                    run = info.key.removesuffix(f"/{keys.PLAN}")
                    return open_store(f"{self.out}/{run}", self.direct)
        return None

    def _end_all(self) -> None:
        """End whoever still runs; these are no kills of the campaign."""
        for started in self._running:
            started.child.kill()
            started.child.wait()
        self._running.clear()

    def _wrong(self, *what: str) -> None:
        self.tally.wrong += what


class Started(NamedTuple):
    """One command at work."""

    child: Child
    name: str
    stage: str
    kills_at: str
    """The failpoint that kills it, or `anywhere`; empty when nothing does."""
