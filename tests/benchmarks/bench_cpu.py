"""The paged engine against static batches on the CPU: one workload of mixed lengths, in fp32, to the same tokens.

    python tests/benchmarks/bench_cpu.py MODEL_FOLDER [--rows 32] [--max-num-seqs 8] [--repeat 2]

The backends take turns, so that other work on the machine hits both alike; CPU seconds, which it hits least, are
told beside the wall's. Exits with 1 if tokens differ, or if paged took longer in the median. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from inference import LLM, SamplingParams
from tests.benchmarks.bench_divergence import TASKS, TOPICS

LENGTHS = (8, 24, 96, 16, 48, 12, 160, 32)
BACKENDS = ("transformers", "paged")


def one_run(llm: LLM, num_rows: int) -> tuple[list[tuple[int, ...]], float, float]:
    """Return tokens, wall seconds and CPU seconds of one pass over the workload."""
    texts = [task.format(topic) for topic in TOPICS for task in TASKS][:num_rows]
    texts = [text * (1 + index % 4) for index, text in enumerate(texts)]
    samplings = [
        SamplingParams(max_tokens=LENGTHS[i % len(LENGTHS)], ignore_eos=True)
        for i in range(num_rows)
    ]
    messages = [[{"role": "user", "content": text}] for text in texts]
    wall, cpu = time.perf_counter(), time.process_time()
    found = llm.chat(messages, samplings)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert all(completion.error is None for completion in found)
    return [completion.token_ids for completion in found], wall, cpu


def compare(model: str, num_rows: int, max_num_seqs: int, repeat: int) -> dict[str, Any]:
    """Run both backends in turns; return their medians and whether their tokens are the same."""
    llms = {
        name: LLM(
            model, backend=name, dtype="float32", max_num_seqs=max_num_seqs, max_model_len=1024
        )
        for name in BACKENDS
    }
    tokens: dict[str, list[tuple[int, ...]]] = {}
    walls: dict[str, list[float]] = {name: [] for name in BACKENDS}
    cpus: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for _ in range(repeat):
        for name, llm in llms.items():
            if name == "paged":
                llm.backend._engine.scheduler.forget_prefixes()  # type: ignore[attr-defined]
            tokens[name], wall, cpu = one_run(llm, num_rows)
            walls[name].append(wall)
            cpus[name].append(cpu)
            print(f"{name:14} {wall:7.1f} s, {cpu:7.1f} s of CPU", flush=True)
    for llm in llms.values():
        llm.close()
    count = sum(map(len, tokens["paged"]))
    wall_s = {name: statistics.median(walls[name]) for name in BACKENDS}
    cpu_s = {name: statistics.median(cpus[name]) for name in BACKENDS}
    return {
        "num_completion_tokens": count,
        "is_same": tokens["paged"] == tokens["transformers"],
        "wall_s": {name: round(value, 2) for name, value in wall_s.items()},
        "cpu_s": {name: round(value, 2) for name, value in cpu_s.items()},
        "tokens_per_s": {name: round(count / value, 1) for name, value in wall_s.items()},
        "speedup": round(wall_s["transformers"] / wall_s["paged"], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    found = compare(args.model, args.rows, args.max_num_seqs, args.repeat)
    threads = torch.get_num_threads()
    print(json.dumps({"benchmark": "cpu", "num_threads": threads, **vars(args), **found}))
    return 0 if found["is_same"] and found["speedup"] >= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
