"""Hours of runs on a real S3 server under random faults; memory and file handles must stay flat.

    python -m tests.faults.soak --hours 2 --folder /tmp/soak [--model MODEL_FOLDER] > soak.log

Runs of a paced dummy engine and, with --model, of a real one take turns until the time is up. Every run
has three replicas: `nightjar run`, a `nightjar drain` that joins and leaves, and one process that lives
through all runs (`soak_replica`). Everything goes through a proxy that breaks one request in SHARE;
the first two are killed at failpoints and at random moments and replaced; the store is killed now and
then and started again. After each run garbage is collected and everything stored is verified over a
clean connection; dummy runs must also equal, row by row, what an undisturbed run wrote.

One line a minute, one JSON document at the end; exit code 1 if anything stored was wrong or not flat.
Flat: over the rests between runs, the long-lived replica's median resident size in the last quarter of its
life is at most 10 % above that of the first, and its least number of open files at most 4 more: connections that
the store's pools still hold at a rest come and go, what leaks stays.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from storage import keys
from storage.errors import StorageError
from storage.failpoints import VARIABLE
from storage.garbage import collect_garbage
from storage.object_store import ObjectStore, StorageConfig, open_store
from tasks.verify import verify_run
from tests.faults.fault_proxy import Dice, FaultProxy
from tests.processes import REPOSITORY, Cli, cli_in, results
from tests.seaweed import ACCESS_KEY, SECRET_KEY, Server, make_bucket

DUMMY_SHARDS, DUMMY_ROWS = 48, 960
MODEL_SHARDS, MODEL_ROWS = 16, 32
FAILPOINTS = ("after_lease", "after_claim", "after_data", "before_commit", "after_commit")
FAILPOINTS += ("before_reveal", "after_copy", "after_reveal")
MAX_RUN_S = 1_500.0
MAX_GROWTH, MAX_NEW_FILES = 1.10, 4


class Rest(NamedTuple):
    """The long-lived replica between two runs."""

    at_s: float
    rss_mib: float
    num_files: int


@dataclass
class Tally:
    commits: int = 0
    rows: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)
    left: int = 0
    store_kills: int = 0
    exits: Counter[str] = field(default_factory=Counter)
    garbage: int = 0
    wrong: list[str] = field(default_factory=list)
    rests: list[Rest] = field(default_factory=list)


class Soak:
    def __init__(self, folder: Path, server: Server, proxy: FaultProxy, cli: Cli, seed: int):
        self.folder, self.server, self.proxy, self.cli = folder, server, proxy, cli
        self.bucket = make_bucket(server.port)
        self.direct = StorageConfig(
            endpoint_url=f"http://127.0.0.1:{server.port}", region="us-east-1"
        )
        self.random = random.Random(seed)
        self.tally = Tally()
        self.began = self.next_line = time.monotonic()
        self.next_store_kill = self.began + 600
        self.reference: pa.Table | None = None
        self.store: ObjectStore | None = None
        self.helpers: dict[str, subprocess.Popen[bytes]] = {}
        self.elder = self._start_elder()

    # ---- one run

    def run(self, kind: str, model: str | None) -> None:
        """One run of three replicas, from its plan to its verification."""
        number = sum(self.tally.runs.values())
        job = self._job(f"{kind}-{number:03d}", kind, model, self.proxy.endpoint_url)
        out = f"s3://{self.bucket}/{kind}-{number:03d}"
        deadline = time.monotonic() + MAX_RUN_S
        self.store, is_joined = None, False
        self._replace("run", job)
        while True:
            self._tick()
            if self.store is None:
                self.store = self._find_run(out)
            if self.store is not None and not is_joined:
                self._tell_elder(self.store.uri)
                is_joined = True
                self._replace("drain", job)
            if self._is_over("run", job):
                break
            if "drain" in self.helpers:
                self._is_over("drain", job)
            if time.monotonic() > deadline:
                self.tally.wrong.append(f"{out}: not published after {MAX_RUN_S:.0f} s")
                break
            self._disturb(kind)
            time.sleep(0.25)
        self._end_helpers()
        if self.store is not None:
            self._wait_for_elder()
            self._check(kind, self.store)
        self.tally.runs[kind] += 1

    def _replace(self, name: str, job: Path) -> None:
        """Start a replica: slowed down at some failpoints, killed now and then at others."""
        rng = self.random
        armed = [
            f"{point}:kill:0.02:{rng.randrange(1 << 30)}"
            if rng.random() < 0.4
            else f"{point}:sleep:1:0"
            for point in FAILPOINTS
        ]
        store = self.store
        if name == "run":
            arguments = ["run", str(job), "--json"]
        else:
            assert store is not None
            arguments = ["drain", store.uri, "--endpoint-url", self.proxy.endpoint_url, "--json"]
        with self._log(name).open("w") as log:  # a pipe nobody reads would fill up
            self.helpers[name] = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", *arguments],
                env={
                    **os.environ,
                    VARIABLE: ",".join(armed),
                    "NIGHTJAR_WORK_DIR": str(self.folder / "work"),
                },
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _is_over(self, name: str, job: Path) -> bool:
        """Whether `nightjar run` has published; whatever ended otherwise is replaced."""
        process = self.helpers[name]
        if process.poll() is None:
            return False
        complaint = self._log(name).read_text()
        self.tally.exits[f"{name} {process.returncode}"] += 1
        if process.returncode not in (0, -signal.SIGKILL, -signal.SIGTERM, 143, 3):
            last = complaint.strip().splitlines()[-1:] or [""]
            self._say(f"{name} ended with {process.returncode}: {last[0][:300]}")
            if process.returncode not in (2,):
                self.tally.wrong.append(f"{name} ended with {process.returncode}: {last[0][:300]}")
        if process.returncode == 0 and name == "run":
            return True
        if process.returncode == 0:
            del self.helpers[name]  # nothing left for it
        else:
            self._replace(name, job)
        return False

    def _disturb(self, kind: str) -> None:
        """Kill a replica or send it away about every minute, and the store every quarter of an hour."""
        rng = self.random
        often = 0.25 / (45.0 if kind == "dummy" else 120.0)
        for name, process in self.helpers.items():
            if process.poll() is None and rng.random() < often:
                if rng.random() < 0.3:
                    process.send_signal(signal.SIGTERM)
                    self.tally.left += 1
                else:
                    process.kill()
                    self.tally.killed[name] += 1
        if time.monotonic() > self.next_store_kill:
            self.server.kill()
            self.tally.store_kills += 1
            self.server.start()
            self.next_store_kill = time.monotonic() + rng.uniform(600, 1200)

    def _check(self, kind: str, store: ObjectStore) -> None:
        self.tally.garbage += len(collect_garbage(store).keys)
        found = verify_run(store, self.folder)
        if not found.is_whole:
            self.tally.wrong.append(f"{store.uri}: {found.violations} {found.missing_shards}")
        self.tally.rows += found.num_rows
        self.tally.commits += found.num_parts
        if kind == "dummy" and not results(store, self.folder).equals(self.reference):
            self.tally.wrong.append(f"{store.uri}: other rows than an undisturbed run's")

    # ---- the long-lived replica

    def _start_elder(self) -> "subprocess.Popen[str]":
        with (self.folder / "elder.err").open("w") as log:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.faults.soak_replica",
                    self.proxy.endpoint_url,
                    "0.01",
                ],
                env={**os.environ, "NIGHTJAR_WORK_DIR": str(self.folder / "elder")},
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _tell_elder(self, uri: str) -> None:
        assert self.elder.stdin is not None
        with suppress(BrokenPipeError):
            self.elder.stdin.write(uri + "\n")
            self.elder.stdin.flush()

    def _wait_for_elder(self) -> None:
        assert self.elder.stdout is not None
        line = self.elder.stdout.readline()
        if not line:
            raise RuntimeError(f"the long-lived replica ended: see {self.folder}/elder.err")
        self._say(f"elder {line.strip()}")
        rss_mib, num_files, _ = _usage(self.elder.pid)
        self.tally.rests.append(Rest(time.monotonic() - self.began, rss_mib, num_files))

    # ---- what is said

    def _tick(self) -> None:
        if time.monotonic() < self.next_line:
            return
        self.next_line = time.monotonic() + 60
        num_commits = 0
        if self.store is not None:
            with suppress(StorageError):
                num_commits = sum(1 for _ in self.store.list(keys.COMMITS))
        usage = {"elder": self.elder.pid, **{n: p.pid for n, p in self.helpers.items()}}
        shown = ", ".join(
            f"{name} {rss:.0f} MiB {files} files {threads} threads"
            for name, (rss, files, threads) in ((n, _usage(pid)) for n, pid in usage.items())
        )
        tally = self.tally
        self._say(
            f"{shown}; runs {sum(tally.runs.values())}, commits {tally.commits}+{num_commits}, "
            f"rows {tally.rows}, kills {sum(tally.killed.values())}, exits {dict(tally.exits)}, "
            f"left {tally.left}, store kills {tally.store_kills}, requests {self.proxy.num_requests}, "
            f"faults {dict(self.proxy.injected)}, wrong {len(tally.wrong)}"
        )

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    # ---- help

    def _find_run(self, out: str) -> ObjectStore | None:
        """The run below `out`, once it is planned."""
        with suppress(StorageError):
            for info in open_store(out, self.direct).list():
                if info.key.endswith(f"/{keys.PLAN}"):
                    return open_store(
                        f"{out}/{info.key.removesuffix('/' + keys.PLAN)}", self.direct
                    )
        return None

    def _end_helpers(self) -> None:
        for process in self.helpers.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait()
        self.helpers.clear()

    def make_reference(self) -> None:
        """What an undisturbed dummy run writes, on a local disk."""
        job = self._job("reference", "dummy", None, None)
        done = self.cli.call("run", str(job), "--json")
        run = json.loads(done.stdout.strip().splitlines()[-1])["run"]
        self.reference = results(open_store(run), self.folder)

    def _job(self, name: str, kind: str, model: str | None, endpoint_url: str | None) -> Path:
        is_dummy = kind == "dummy"
        num_rows, num_shards = (
            (DUMMY_ROWS, DUMMY_SHARDS) if is_dummy else (MODEL_ROWS, MODEL_SHARDS)
        )
        prompts = self.folder / f"{kind}.parquet"
        if not prompts.exists():
            texts = [f"Say {row} words about the sea" for row in range(num_rows)]
            pq.write_table(pa.table({"prompt": texts}), prompts)
        settings: dict[str, Any] = {
            "input__uri": str(prompts),
            "input__prompt_column": "prompt",
            "sampling__max_tokens": 64 if is_dummy else 8,
            "shards__max_rows": num_rows // num_shards,
        }
        if endpoint_url is not None:
            settings["output__uri"] = f"s3://{self.bucket}/{name}"
            settings["storage__endpoint_url"] = endpoint_url
        if not is_dummy:
            settings |= {"model__source": model, "engine__backend": "transformers"}
            settings |= {"hardware__stage_to": "none", "hardware__replicas": 1}
        return self.cli.job(name, **settings)


def _usage(pid: int) -> tuple[float, int, int]:
    """Resident MiB, open files, threads of a process; zeros once it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        files = len(os.listdir(f"/proc/{pid}/fd"))
        threads = len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0.0, 0, 0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files, threads


def flatness(rests: list[Rest]) -> dict[str, Any]:
    """Compare the first and the last quarter of a life; the first rest of each kind is warm-up."""
    lived = rests[2:]
    if len(lived) < 8:
        return {"num_rests": len(lived), "is_flat": False}
    quarter = len(lived) // 4
    first, last = lived[:quarter], lived[-quarter:]
    rss = [statistics.median(rest.rss_mib for rest in part) for part in (first, last)]
    files = [min(rest.num_files for rest in part) for part in (first, last)]
    return {
        "num_rests": len(lived),
        "rss_mib_first_last_quarter": [round(value, 1) for value in rss],
        "files_first_last_quarter": files,
        "is_flat": rss[1] <= rss[0] * MAX_GROWTH and files[1] <= files[0] + MAX_NEW_FILES,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--model", help="model folder for the runs of a real engine")
    parser.add_argument("--share", type=float, default=0.06, help="of requests that are broken")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    args = parser.parse_args()
    aws = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    os.environ.update(aws, AWS_DEFAULT_REGION="us-east-1", OMP_NUM_THREADS="1")
    print(f"seed {args.seed}", flush=True)
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "weed").mkdir(parents=True)
        server = Server(folder / "weed")
        stack.callback(server.kill)
        server.start()
        dice = Dice(args.share, args.seed)
        proxy = stack.enter_context(FaultProxy(server.port, dice=dice, keeps_lines=False))
        cli = stack.enter_context(cli_in(folder))
        soak = Soak(folder, server, proxy, cli, args.seed)
        stack.callback(soak.elder.kill)
        soak.make_reference()
        kinds = ["dummy", "model"] if args.model else ["dummy"]
        while time.monotonic() < soak.began + args.hours * 3600:
            soak.run(kinds[sum(soak.tally.runs.values()) % len(kinds)], args.model)
        summary = summarise(soak)
        print(json.dumps(summary), flush=True)
    return 0 if summary["is_whole"] and summary["is_flat"] else 1


def summarise(soak: Soak) -> dict[str, Any]:
    tally = soak.tally
    return {
        "hours": round((time.monotonic() - soak.began) / 3600, 2),
        "runs": dict(tally.runs),
        "shards_committed": tally.commits,
        "rows_verified": tally.rows,
        "requests": soak.proxy.num_requests,
        "faults": dict(soak.proxy.injected),
        "num_faults": sum(soak.proxy.injected.values()),
        "exits": dict(tally.exits),
        "num_replicas_killed": sum(
            count for name, count in tally.exits.items() if name.endswith("-9")
        ),
        "store_kills": tally.store_kills,
        "garbage_collected": tally.garbage,
        "wrong": tally.wrong,
        "is_whole": not tally.wrong,
        **flatness(tally.rests),
    }


if __name__ == "__main__":
    sys.exit(main())
