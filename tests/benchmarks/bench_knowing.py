"""What progress, metrics and receipts cost beside the engine.

Measures the bookkeeping of a step, a row, a scrape and a look at a run of 200 shards alone, in processor
time, and sets them against an engine that makes `--tokens-per-s` tokens a second in steps of `--running`
sequences. All of it is Python under one lock, so its share of a core is at most what the engine loses.

    python -m tests.benchmarks.bench_knowing --tokens-per-s 30000 --running 1024 --mean-tokens 300
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flows.config import load_job
from inference.backends.base import EngineStats
from inference.sampling import SamplingParams
from storage.commits import CommitCache
from tasks.content import answer_digest, prompt_digest, row_digest
from tasks.drain import drain, new_invocation
from tasks.gpu_sample import open_gpu
from tasks.latency import Latencies
from tasks.lengths import bucket
from tasks.metering import Meter
from tasks.metrics import EngineReading, ReplicaCollector
from tasks.orchestrate import LOOK_EVERY_S
from tasks.progress import Progress
from tasks.repetition import is_repetitive
from tasks.run import Run, prepare
from tasks.stop import StopSignal
from tasks.watch import look_at

REPEATS = 20_000
SCRAPE_EVERY_S = 15.0
NUM_SHARDS = 200


def timed(work: Callable[[], object], repeats: int) -> float:
    """Return the processor seconds of one call."""
    started = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - started) / repeats


def step_s() -> float:
    """What `Replica._step` does beside the engine's own, with a tail's work."""
    meter, stats = Meter(), EngineStats()

    def step() -> None:
        begun, decoded, running, steps = time.monotonic(), stats.decode_s, 7, stats.num_steps
        meter.step_s += time.monotonic() - begun
        meter.tail_s += stats.decode_s - decoded
        meter.tail_tokens += running * (stats.num_steps - steps)

    return timed(step, REPEATS)


def row_s(mean_tokens: int) -> float:
    """A finished row: progress, latency, repetition, length, and the digests a later run finds it by."""
    progress, latencies, sampling = Progress(), Latencies(), SamplingParams()
    tokens = tuple(range(mean_tokens))
    lengths: dict[int, int] = {}

    def row() -> None:
        latencies.add(1.0)
        progress.row_done("ok", mean_tokens)
        is_repetitive(tokens)
        bound = bucket(mean_tokens)
        lengths[bound] = lengths.get(bound, 0) + 1
        content = row_digest(prompt_digest(tokens, is_thinking=False), sampling, 7)
        answer_digest(b"engine", content, 0)

    return timed(row, REPEATS)


class Idle:
    """A replica as metrics see it."""

    latencies = Latencies()

    def reading(self) -> EngineReading:
        return EngineReading(num_running=7)


def scrape_s() -> float:
    """One scrape, and one of the driver's readings where there is a GPU."""
    collector = ReplicaCollector(
        Idle(),
        Progress(),
        labels={"run": "r", "job": "j"},
        staging_gb_per_s=lambda: 1.0,
        gpu=open_gpu(),
    )
    return timed(lambda: list(collector.collect()), 200)


def look_s(run: Run) -> float:
    """One look at a run with all its commits known, as the watch and Prefect's artifacts take it."""
    cache: CommitCache = {}
    look_at(run.store, cache)
    return timed(lambda: look_at(run.store, cache), 20)


def finished_run(folder: Path) -> Run:
    """Drain 200 shards of one row."""
    lines = [json.dumps({"text": f"row {n}"}) for n in range(NUM_SHARDS)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    job = load_job(
        {
            "model": {"source": "dummy"},
            "input": {"uri": str(folder / "in.jsonl"), "prompt": "{text}"},
            "output": {"uri": str(folder / "out")},
            "engine": {"backend": "dummy"},
            "shards": {"max_rows": 1},
        }
    )
    (folder / "work").mkdir()
    run = prepare(job, work_dir=folder / "work", progress=Progress())
    drain(run, invocation=new_invocation(), progress=Progress(), should_stop=StopSignal())
    return run


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens-per-s", type=float, default=30_000)
    parser.add_argument("--running", type=int, default=1024)
    parser.add_argument("--mean-tokens", type=int, default=300)
    args = parser.parse_args()
    a_step, a_row, a_scrape = step_s(), row_s(args.mean_tokens), scrape_s()
    with tempfile.TemporaryDirectory() as folder:
        run = finished_run(Path(folder))
        a_look = look_s(run)
        run.close()
    shares = {
        "steps": a_step * args.tokens_per_s / args.running,
        "rows": a_row * args.tokens_per_s / args.mean_tokens,
        "scrapes": a_scrape / SCRAPE_EVERY_S,
        "looks": a_look / LOOK_EVERY_S,
    }
    result = {
        "benchmark": "knowing",
        "tokens_per_s": args.tokens_per_s,
        "us_per_step": round(a_step * 1e6, 2),
        "us_per_row": round(a_row * 1e6, 2),
        "ms_per_scrape": round(a_scrape * 1e3, 3),
        "ms_per_look": round(a_look * 1e3, 3),
        **{f"share_{name}": round(share, 6) for name, share in shares.items()},
        "share_of_one_core": round(sum(shares.values()), 6),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
