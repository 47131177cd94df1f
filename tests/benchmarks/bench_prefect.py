"""What Prefect costs per shard: the same job by `nightjar run`, with a Prefect server and without one.

    python tests/benchmarks/bench_prefect.py [--shards 200] [--rounds 3]

Judged against 50 ms per shard. Rounds alternate plain and Prefect runs of a job whose rows cost almost
nothing (dummy engine, local folder), so that a shard is its own bookkeeping. Wall time is that between
the first and the last commit, so neither start-up nor publishing counts; CPU time is that of the whole
command less that of the same command over one shard. The server records task runs later, in its own
process; its CPU time is told separately. On a busy machine believe the CPU times.
The last line is one JSON document.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.prefect_server import ROOT, PrefectLab, running_prefect

TARGET_MS = 50.0
_TICKS = os.sysconf("SC_CLK_TCK")


def write_job(folder: Path, num_shards: int) -> Path:
    """One row per shard."""
    folder.mkdir()
    prompts = [f"say {row}" for row in range(num_shards)]
    pq.write_table(pa.table({"prompt": prompts}), folder / "in.parquet")
    job = {
        "name": "bench",
        "model": {"source": "none"},
        "input": {"uri": str(folder / "in.parquet"), "prompt_column": "prompt"},
        "output": {"uri": str(folder / "out")},
        "sampling": {"max_tokens": 1},
        "shards": {"max_rows": 1},
        "engine": {"backend": "dummy"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


def run(folder: Path, num_shards: int, env: dict[str, str]) -> dict[str, float]:
    """Run one job to its end; return seconds between its first and last commit, and of its CPUs."""
    job = write_job(folder, num_shards)
    command = [sys.executable, "-m", "flows.cli", "run", str(job), "--json"]
    before = os.times()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr
    commits = sorted(path.stat().st_mtime for path in folder.glob("out/*/commits/*.json"))
    assert len(commits) == num_shards
    cpu_s = after.children_user + after.children_system
    cpu_s -= before.children_user + before.children_system
    return {"wall_s": commits[-1] - commits[0], "cpu_s": cpu_s}


def server_cpu_s(lab: PrefectLab) -> float:
    assert lab.server is not None
    fields = Path(f"/proc/{lab.server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def wait_until_recorded(lab: PrefectLab, num_task_runs: int) -> None:
    """The server has every task run, or a minute has passed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and lab.api("/task_runs/count", {}) < num_task_runs:
        time.sleep(0.5)


def measure(folder: Path, lab: PrefectLab, num_shards: int, rounds: int) -> dict[str, Any]:
    without = {key: value for key, value in lab.env.items() if key != "PREFECT_API_URL"}
    environments = {"plain": without, "prefect": lab.env}
    fixed = {
        name: run(folder / f"one-{name}", 1, env)["cpu_s"] for name, env in environments.items()
    }
    found: dict[str, list[dict[str, float]]] = {"plain": [], "prefect": []}
    server_ms = []
    for number in range(rounds):
        for name, env in environments.items():
            before, seen = server_cpu_s(lab), lab.api("/task_runs/count", {})
            measured = run(folder / f"{name}-{number}", num_shards, env)
            if name == "prefect":
                wait_until_recorded(lab, seen + num_shards + 2)
                server_ms.append(1000 * (server_cpu_s(lab) - before) / num_shards)
            found[name].append(
                {
                    "wall_ms": 1000 * measured["wall_s"] / (num_shards - 1),
                    "cpu_ms": 1000 * (measured["cpu_s"] - fixed[name]) / (num_shards - 1),
                }
            )
    overhead = {
        kind: statistics.median(
            p[kind] - q[kind] for p, q in zip(found["prefect"], found["plain"], strict=True)
        )
        for kind in ("wall_ms", "cpu_ms")
    }
    return {
        "shards": num_shards,
        "rounds": rounds,
        "per_shard": found,
        "overhead_per_shard": overhead,
        "server_cpu_ms_per_shard": statistics.median(server_ms),
        "load_average": os.getloadavg()[0],
        "target_ms": TARGET_MS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "prefect").mkdir()
        with running_prefect(folder / "prefect") as lab:
            found = measure(folder, lab, args.shards, args.rounds)
    print("round        plain wall / CPU      Prefect wall / CPU   (ms per shard)")
    for number in range(args.rounds):
        plain, prefect = (found["per_shard"][name][number] for name in ("plain", "prefect"))
        print(
            f"{number}       {plain['wall_ms']:9.1f} / {plain['cpu_ms']:6.1f}"
            f"     {prefect['wall_ms']:9.1f} / {prefect['cpu_ms']:6.1f}"
        )
    over = found["overhead_per_shard"]
    print(
        f"overhead, median of the pairs: {over['wall_ms']:.1f} ms wall, {over['cpu_ms']:.1f} ms CPU; "
        f"server {found['server_cpu_ms_per_shard']:.1f} ms CPU; target {TARGET_MS:.0f} ms"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
