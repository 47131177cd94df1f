"""Ten million rows planned, and five thousand shards committed: time, memory, and what the store is asked.

Planning: `--rows` short prompts in ten Parquet files are planned by a process of its own. Committing: a run
of `--shards` shards with the dummy engine, to a local folder or (`--s3`) to a real S3 server behind a
proxy that counts requests; then the same run is started again, looked at, and cleaned of garbage, to
know what the listings cost. Judged against memory that does not grow with rows or shards, and fewer than
20 requests for a shard.

    python -m tests.benchmarks.bench_scale --rows 10000000 --shards 5000 [--s3] [--folder DIR]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flows.config import load_job
from storage import keys
from storage.object_store import StorageConfig, open_store
from tasks.progress import Progress
from tasks.run import prepare
from tests.faults.fault_proxy import FaultProxy, Rule
from tests.processes import REPOSITORY, Cli, children, cli_in
from tests.seaweed import ACCESS_KEY, SECRET_KEY, Server, make_bucket

ROWS_PER_SHARD = 20
ROWS_PER_BATCH = 100_000


class Memory(threading.Thread):
    """Samples the resident size of a process and of its feed until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._over = threading.Event()
        self.samples: list[tuple[float, float, int]] = []
        """(MiB of the process, MiB of its feed, its open files)"""

    def run(self) -> None:
        while not self._over.wait(0.5):
            feed = max((resident(pid) for pid in children(self._pid, "feed_child")), default=0.0)
            self.samples.append((resident(self._pid), feed, open_files(self._pid)))

    def thirds(self) -> dict[str, Any]:
        """Peaks in each third of its life, start-up and end included."""
        self._over.set()
        self.join()
        count = max(1, len(self.samples) // 3)
        parts = [self.samples[i * count : (i + 1) * count] for i in range(3)]
        return {
            name: [round(max((s[at] for s in part), default=0)) for part in parts]
            for at, name in enumerate(("process_mib", "feed_mib", "files"))
        }


def resident(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def write_prompts(folder: Path, num_rows: int, num_files: int) -> None:
    folder.mkdir(parents=True)
    schema = pa.schema([("id", pa.int64()), ("prompt", pa.string())])
    per_file = -(-num_rows // num_files)
    for number in range(num_files):
        with pq.ParquetWriter(folder / f"{number:02d}.parquet", schema) as writer:
            end = min(num_rows, (number + 1) * per_file)
            for start in range(number * per_file, end, ROWS_PER_BATCH):
                rows = range(start, min(end, start + ROWS_PER_BATCH))
                texts = [f"Say {row} words about the sea" for row in rows]
                writer.write_table(pa.table({"id": list(rows), "prompt": texts}, schema))


def plan(cli: Cli, num_rows: int, num_shards: int) -> dict[str, Any]:
    """Plan in a process of its own."""
    write_prompts(cli.folder / "many", num_rows, 10)
    job = cli.job(
        "plan",
        input__uri=str(cli.folder / "many"),
        input__prompt_column="prompt",
        shards__max_rows=-(-num_rows // num_shards),
    )
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.bench_scale", "--prepare", str(job)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    memory = Memory(process.pid)
    memory.start()
    out, _ = process.communicate()
    seconds = time.monotonic() - began
    found = json.loads(out)
    return {
        **found,
        "seconds": round(seconds, 1),
        "rows_per_s": round(found["rows"] / seconds),
        **memory.thirds(),
    }


def prepare_only(job: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(load_job(job), work_dir=Path(folder), progress=Progress())
        table = run.store.head(keys.PLAN_TABLE).size
        print(
            json.dumps(
                {"rows": run.plan.num_rows, "shards": len(run.shards), "plan_kb": table >> 10}
            )
        )
        run.close()


class Counted:
    """Counts requests by kind; never breaks one."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def __call__(self, line: str) -> Rule | None:
        verb, target, _ = line.split(" ")
        path, _, query = target.partition("?")
        kind = "LIST" if "list-type" in query else verb
        where = re.search(r"/(_attempts|_leases|_probe|commits|completions|metrics)/", path)
        prefix = re.search(r"prefix=[^&]*%2F(_attempts|_leases|commits|completions)", query)
        found = where or prefix
        self.kinds[f"{kind} {found[1] if found else 'other'}"] += 1
        return None

    def take(self) -> Counter[str]:
        taken, self.kinds = self.kinds, Counter()
        return taken


def commit(cli: Cli, num_shards: int, out: str, endpoint: str | None, counted: Counted) -> Any:
    """Run it, run it again, look at it, collect."""
    write_prompts(cli.folder / "few", num_shards * ROWS_PER_SHARD, 1)
    settings: dict[str, Any] = {"storage__endpoint_url": endpoint} if endpoint else {}
    job = cli.job(
        "commit",
        input__uri=str(cli.folder / "few"),
        input__prompt_column="prompt",
        sampling__max_tokens=8,
        canary__rows=0,
        shards__max_rows=ROWS_PER_SHARD,
        output__uri=out,
        **settings,
    )
    steps: dict[str, Any] = {}
    uri = ""
    at = ["--endpoint-url", endpoint] if endpoint else []
    for name in ("run", "run again", "status", "gc"):
        argv = ["run", str(job), "--json"] if name.startswith("run") else [name, uri, *at, "--json"]
        began = time.monotonic()
        process = cli.start(*argv)
        memory = Memory(process.pid)
        memory.start()
        said, complaint = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{name}: exit {process.returncode}: {complaint[-500:]}")
        uri = uri or json.loads(said.strip().splitlines()[-1])["run"]
        kinds = counted.take()
        steps[name] = {
            "seconds": round(time.monotonic() - began, 1),
            **memory.thirds(),
            "requests": sum(kinds.values()),
            "requests_by_kind": dict(kinds.most_common(14)),
        }
    store = open_store(uri, StorageConfig(endpoint_url=endpoint))
    num_commits = sum(1 for _ in store.list(keys.COMMITS))
    return {
        "shards": num_shards,
        "commits": num_commits,
        "requests_per_shard": round(steps["run"]["requests"] / num_shards, 2),
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=5_000)
    parser.add_argument("--s3", action="store_true", help="commit to a real S3 server")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        prepare_only(args.prepare)
        return
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True, parents=True)
        cli = stack.enter_context(cli_in(folder))
        if args.rows:
            found["plan"] = plan(cli, args.rows, args.shards)
            print(json.dumps(found["plan"], indent=1), file=sys.stderr, flush=True)
        counted = Counted()
        out, endpoint = str(folder / "committed"), None
        if args.s3:
            os.environ.update(AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET_KEY)
            (folder / "weed").mkdir()
            server = Server(folder / "weed")
            stack.callback(server.kill)
            server.start()
            proxy = FaultProxy(server.port, dice=counted, keeps_lines=False)
            stack.enter_context(proxy)
            out, endpoint = f"s3://{make_bucket(server.port)}/out", proxy.endpoint_url
        if args.shards:
            found["commit"] = commit(cli, args.shards, out, endpoint, counted)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
