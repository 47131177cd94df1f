"""The fault campaign: kills and store faults by the thousand, a full disk, planted bugs. One command.

    python -m tests.faults.campaign                           # about an hour on two cores
    python -m tests.faults.campaign --kills 60 --faults 300   # some minutes

    local    whole lives of runs in a folder: SIGKILL at every failpoint, wrong clocks, broken leases
    s3       the same on a real S3 server, through a proxy that breaks one request in eight; the server
             itself is killed now and then (`lives`)
    races    the commit protocol alone, in folders, and on the server with a third of all requests
             broken (`races`)
    disk     a run whose disk is full, again and again
    bugs     the protocol with a planted bug, and a stager that trusts its journal: each must be caught

Everything is judged from the store alone (`store_checks`). Ends with one JSON document; exit code 1 if
anything was wrong or a planted bug was not caught within a minute.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.object_store import StorageConfig, open_store
from tests.faults.disks import full_disk, small_disk
from tests.faults.fault_proxy import Dice, FaultProxy
from tests.faults.forked import Forks
from tests.faults.journal_bug import stages_damage, trusting_journal
from tests.faults.lives import Life, Tally
from tests.faults.races import BUGS, Race, seconds_until_caught
from tests.processes import Cli, cli_in, results
from tests.seaweed import ACCESS_KEY, SECRET_KEY, Server, make_bucket

NUM_ROWS, NUM_SHARDS = 96, 24
LOCAL_SHARE, S3_SHARE = 0.3, 0.07  # of the kills; the rest is the races'
STORE_KILL_EVERY_S = 600.0
SKEW_S = 86_400.0


@dataclass
class Campaign:
    """What all parts of it share."""

    folder: Path
    cli: Cli
    forks: Forks
    seed: int
    num_kills: int
    num_faults: int
    reference: pa.Table = None
    parts: dict[str, Tally] = field(default_factory=dict)
    proxies: list[FaultProxy] = field(default_factory=list)
    """One for the lives on S3, two for the races there."""

    store_kills: int = 0
    is_broken: bool = False
    """A lane ended with an exception."""

    def job(self, name: str, out: str, **settings: Any) -> Path:
        prompts = self.folder / "prompts.parquet"
        if not prompts.exists():
            texts: list[str | None] = [f"Tell me {row} things" for row in range(NUM_ROWS)]
            texts[7] = None  # a bad row is a row of the result too
            pq.write_table(pa.table({"prompt": texts}), prompts)
        return self.cli.job(
            name,
            input__uri=str(prompts),
            input__prompt_column="prompt",
            shards__max_rows=NUM_ROWS // NUM_SHARDS,
            output__uri=out,
            **settings,
        )

    def make_reference(self) -> None:
        """What an undisturbed run writes."""
        done = self.forks.call(["run", str(self.job("reference", f"{self.folder}/ref")), "--json"])
        run = json.loads(done.said_whole().splitlines()[-1])["run"]
        self.reference = results(open_store(run), self.folder)

    def local_lives(self) -> None:
        tally = self.parts["local"] = Tally()
        while tally.num_kills < self.num_kills * LOCAL_SHARE and not self._ends(tally):
            out = self.folder / f"local-{tally.lives}"
            self._live(self.job(out.name, str(out)), str(out), tally, StorageConfig(), None)

    def s3_lives(self, server: Server) -> None:
        tally = self.parts["s3"] = Tally()
        bucket = make_bucket(server.port)
        url = self.proxies[0].endpoint_url
        while tally.num_kills < self.num_kills * S3_SHARE and not self._ends(tally):
            out = f"s3://{bucket}/life-{tally.lives}"
            job = self.job(f"life-{tally.lives}", out, storage__endpoint_url=url)
            self._live(job, out, tally, config_of(server), url)

    def s3_races(self, server: Server, lane: int) -> None:
        """Race on the server until so many faults were injected, whatever the others still do."""
        tally = self.parts[f"s3 races {lane}"] = Tally()
        bucket, rng = make_bucket(server.port), random.Random(f"{self.seed} {lane}")
        proxy = self.proxies[lane]
        while self.injected < self.num_faults and not self._ends(tally):
            store = open_store(f"s3://{bucket}/{tally.lives}", config_of(server))
            race = Race(store, proxy.endpoint_url, self.forks, rng.randrange(1 << 20), tally)
            race.deadliness = 0.3  # a process that lives longer meets more faults
            tally.wrong += race.run()

    def local_races(self) -> None:
        """Race in folders until there were enough kills, over all parts."""
        tally = self.parts["local races"] = Tally()
        rng = random.Random(self.seed)
        expected = self.num_kills * (LOCAL_SHARE + S3_SHARE)
        while tally.num_kills + max(expected, self._num_kills_elsewhere()) < self.num_kills:
            folder = self.folder / f"race-{tally.lives}"
            store = open_store(str(folder), StorageConfig())
            tally.wrong += Race(store, "", self.forks, rng.randrange(1 << 20), tally).run()
            if self._ends(tally):
                break
            shutil.rmtree(folder)

    def _ends(self, tally: Tally) -> bool:
        return bool(tally.wrong) or self.is_broken

    def _num_kills_elsewhere(self) -> int:
        return sum(t.num_kills for name, t in self.parts.items() if name != "local races")

    @property
    def injected(self) -> int:
        return sum(sum(proxy.injected.values()) for proxy in self.proxies)

    def bugs(self, server: Server) -> dict[str, str]:
        """Plant each bug; say how soon it was caught, and by what."""
        bucket, rng = make_bucket(server.port), random.Random(self.seed)
        caught = {}
        with FaultProxy(server.port, dice=Dice(0.2, self.seed, stall_s=0.5)) as proxy:
            for bug in BUGS:
                seconds, what = seconds_until_caught(
                    bug,
                    lambda name: open_store(f"s3://{bucket}/{name}", config_of(server)),
                    proxy,
                    self.forks,
                    rng,
                )
                caught[bug] = f"{seconds:.1f} s: {what.partition(': ')[2]}"
        began = time.monotonic()
        assert not stages_damage(server.port, bucket, self.folder / "journal-right")
        with trusting_journal():
            assert stages_damage(server.port, bucket, self.folder / "journal-bug")
        took = time.monotonic() - began
        caught["trusting the resume journal"] = f"{took:.1f} s: the staged bytes are other ones"
        return caught

    def disk(self) -> dict[str, Any]:
        with small_disk(self.folder / "disk") as disk:
            if disk is None:
                return {"skipped": "mounting a small tmpfs is not allowed here"}
            job = self.job("disk", str(disk))
            num_full, num_killed, wrong = full_disk(self.forks, disk, job, NUM_ROWS, seed=self.seed)
        return {"times_full": num_full, "kills": num_killed, "wrong": wrong}

    def _live(
        self, job: Path, out: str, tally: Tally, direct: StorageConfig, endpoint: str | None
    ) -> None:
        folder = self.folder / ("checks-s3" if endpoint else "checks-local")
        folder.mkdir(exist_ok=True)
        Life(
            forks=self.forks,
            job=job,
            out=out,
            direct=direct,
            endpoint_url=endpoint,
            rng=random.Random(f"{self.seed} {job.name} {out}"),
            tally=tally,
            reference=self.reference,
            folder=folder,
            skew_s=SKEW_S,
            refusal="is the store" if endpoint else "-",
        ).live()


def config_of(server: Server) -> StorageConfig:
    return StorageConfig(endpoint_url=f"http://127.0.0.1:{server.port}", region="us-east-1")


def run(campaign: Campaign, server: Server) -> dict[str, Any]:
    """All parts side by side, the store killed now and then beneath them; then the disk and the bugs."""
    began = time.monotonic()
    campaign.make_reference()
    over = threading.Event()
    with ThreadPoolExecutor(6) as lanes:
        work = [lanes.submit(campaign.local_lives), lanes.submit(campaign.local_races)]
        work += [lanes.submit(campaign.s3_lives, server)]
        work += [lanes.submit(campaign.s3_races, server, lane) for lane in (1, 2)]
        reporter = lanes.submit(_report, campaign, server, over)
        try:
            for lane in as_completed(work):
                campaign.is_broken |= lane.exception() is not None  # the others end too
                lane.result()
        finally:
            over.set()
            reporter.result()
    injected = sum((proxy.injected for proxy in campaign.proxies), Counter[str]())
    disk = campaign.disk()
    caught = campaign.bugs(server)
    tallies = campaign.parts
    wrong = [what for tally in tallies.values() for what in tally.wrong] + disk.get("wrong", [])
    return {
        "seed": campaign.seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "kills": sum(tally.num_kills for tally in tallies.values()) + disk.get("kills", 0),
        "faults": sum(injected.values()),
        "faults_by_kind": dict(injected.most_common()),
        "store_kills": campaign.store_kills,
        "parts": {name: tally.as_document() for name, tally in tallies.items()},
        "full_disk": disk,
        "bugs_caught": caught,
        "wrong": wrong,
    }


def _report(campaign: Campaign, server: Server, over: threading.Event) -> None:
    """A line a minute; and kill the store beneath everybody now and then."""
    next_kill = time.monotonic() + STORE_KILL_EVERY_S
    said: set[str] = set()
    while not over.wait(60.0):
        wrong = {what for tally in list(campaign.parts.values()) for what in tally.wrong}
        for what in wrong - said:
            print(f"WRONG {what}", flush=True)
        said |= wrong
        parts = {
            name: f"{tally.num_kills} kills, {tally.lives} lives, {len(tally.wrong)} wrong"
            for name, tally in campaign.parts.items()
        }
        now, faults = time.strftime("%H:%M:%S"), campaign.injected
        print(f"{now} {parts}, {faults} faults, {campaign.store_kills} store kills", flush=True)
        if time.monotonic() > next_kill:
            server.kill()
            server.start()
            campaign.store_kills += 1
            next_kill = time.monotonic() + STORE_KILL_EVERY_S


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    args = parser.parse_args()
    os.environ.update(
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SECRET_KEY,
        AWS_DEFAULT_REGION="us-east-1",
    )
    print(f"seed {args.seed}", flush=True)
    with ExitStack() as stack:
        shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=shm)))
        (folder / "weed").mkdir()
        server = Server(folder / "weed")
        stack.callback(server.kill)
        server.start()
        cli = stack.enter_context(cli_in(folder))
        forks = stack.enter_context(Forks(folder))
        campaign = Campaign(folder, cli, forks, args.seed, args.kills, args.faults)
        for number, share in enumerate((0.125, 0.35, 0.35)):
            dice = Dice(share, args.seed + number, stall_s=0.5 if number else 2.0)
            proxy = FaultProxy(server.port, dice=dice, keeps_lines=False)
            campaign.proxies.append(stack.enter_context(proxy))
        found = run(campaign, server)
    print(json.dumps(found), flush=True)
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
