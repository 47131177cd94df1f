"""What progress, metrics and receipts cost beside the engine.

Measures the bookkeeping of a step and of a row alone, in this process, and sets both against an engine
that makes `--tokens-per-s` tokens a second in steps of `--running` sequences.

    python tests/benchmarks/bench_knowing.py --tokens-per-s 30000 --running 1024 --mean-tokens 300
"""

import argparse
import json
import time

from inference.backends.base import EngineStats
from tasks.latency import Latencies
from tasks.lengths import bucket
from tasks.progress import Progress
from tasks.receipt import Meter
from tasks.repetition import is_repetitive

REPEATS = 20_000


def step_s() -> float:
    """Seconds of bookkeeping a step takes: what `Replica._step` does beside the engine's own."""
    meter, stats = Meter(), EngineStats()
    started = time.perf_counter()
    for _ in range(REPEATS):
        begun, decoded = time.monotonic(), stats.decode_s
        now = time.monotonic()
        meter.step_s += now - begun
        meter.tail_s += stats.decode_s - decoded
    return (time.perf_counter() - started) / REPEATS


def row_s(mean_tokens: int) -> float:
    """Seconds a finished row takes: progress, latency, repetition, length."""
    progress, latencies = Progress(), Latencies()
    tokens = tuple(range(mean_tokens))
    lengths: dict[int, int] = {}
    started = time.perf_counter()
    for _ in range(REPEATS):
        latencies.add(1.0)
        progress.row_done("ok", mean_tokens)
        is_repetitive(tokens)
        bound = bucket(mean_tokens)
        lengths[bound] = lengths.get(bound, 0) + 1
    return (time.perf_counter() - started) / REPEATS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens-per-s", type=float, default=30_000)
    parser.add_argument("--running", type=int, default=1024)
    parser.add_argument("--mean-tokens", type=int, default=300)
    args = parser.parse_args()
    a_step, a_row = step_s(), row_s(args.mean_tokens)
    steps = args.tokens_per_s / args.running
    rows = args.tokens_per_s / args.mean_tokens
    print(
        json.dumps(
            {
                "us_per_step": round(a_step * 1e6, 2),
                "us_per_row": round(a_row * 1e6, 2),
                "share_of_one_core": round(a_step * steps + a_row * rows, 6),
                "tokens_per_s": args.tokens_per_s,
            }
        )
    )


if __name__ == "__main__":
    main()
