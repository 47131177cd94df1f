"""How long a replica takes for a request mix, alone on a device or spread over several: random weights, real ranks.

    python tests/benchmarks/bench_ranks.py 32b:2:chat:1024 8b:2:chat:1024 8b:1:chat:512 30b-a3b:1:chat:1024

Each argument is MODEL:RANKS:MIX:COUNT, run by processes of its own that are ended after `--limit` seconds. All that
a job's replica has is in it: launcher, preflight, sockets, memory plan, graphs; only reading the weights is not.
Prints what happens when, and one line of JSON for each, also for one that fails; that one is tried again without
graphs.

Two replicas take as long for a mix as one takes for half of its rows: `8b:1:chat:512` stands for `8b` on two
devices with 1,024 rows.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

STARTED_AT = time.monotonic()


def say(text: str) -> None:
    """Print a line with the seconds since this process began."""
    print(f"[{time.monotonic() - STARTED_AT:6.1f} s] {text}", flush=True)


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Start a replica and run its mix; return what was found."""
    import torch
    import transformers

    from inference.backends.ranked import RankedBackend
    from inference.config import EngineConfig
    from tests.benchmarks.random_model import config_of, write_folder

    shape, size, mix, count = case.split(":")
    folder = write_folder(Path(tempfile.gettempdir()) / f"random-{shape}", config_of(shape))
    say("folder written")
    started_at = time.perf_counter()
    backend = RankedBackend(
        EngineConfig(
            model=str(folder),
            backend="paged",
            tensor_parallel_size=int(size),
            max_model_len=4096,
            max_num_seqs=args.max_num_seqs or "auto",
            max_num_batched_tokens=args.max_num_batched_tokens or "auto",
            enforce_eager=args.eager,
            quantization="fp8" if args.fp8 else "none",
            kv_cache_dtype="fp8" if args.fp8 else "auto",
        ),
        module="tests.benchmarks.random_rank",
    )
    say(f"ready: {backend.info}")
    found = {"start_s": round(time.perf_counter() - started_at, 1), "device": backend.info.device}
    try:
        run(backend, "chat", min(64, int(count)), first_id=0, most=48)
        say("warm")
        before = backend.stats.num_steps
        elapsed_s, num_prompt, num_completion = run(backend, mix, int(count), first_id=1_000_000)
        steps = backend.stats.num_steps - before
        extra = dict(backend.stats.extra)
        peak = backend.stats.peak_device_bytes
    finally:
        backend.close()
    predicted_s = predicted(shape, int(size), mix, int(count), backend.info, args)
    return {
        **found,
        "predicted_s": predicted_s and round(predicted_s, 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "s": round(elapsed_s, 2),
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "completion_tokens_per_s": round(num_completion / elapsed_s),
        "steps": steps,
        "ms_per_step": round(elapsed_s / max(1, steps) * 1e3, 2),
        "peak_gb": round(peak / 1e9, 1),
        **extra,
    }


def predicted(
    shape: str, size: int, mix: str, count: int, info: Any, args: argparse.Namespace
) -> float | None:
    """Seconds that the sizing expects of this mix on this GPU; None for one it does not know."""
    from inference.hardware import match_gpu
    from inference.model_config import model_shape
    from inference.prediction import predict
    from inference.request_mixes import requests
    from inference.roofline import Replica
    from inference.workload import Workload
    from tasks.hardware import load_hardware
    from tests.benchmarks.random_model import config_of

    known = load_hardware()
    memory = next((gpu.memory_bytes for gpu in known if gpu.name in info.device), 0.0)
    gpu = match_gpu(info.device, memory, known)
    if gpu is None:
        return None
    rows = [(len(prompt), length) for prompt, length in requests(mix, count)]
    reused = 512 * (count - 1) if mix == "template" else 0
    replica = Replica(
        shape=model_shape(config_of(shape).to_dict()),
        gpu=gpu,
        tensor_parallel_size=size,
        quantization="fp8" if args.fp8 else "none",
        kv_cache_dtype="fp8" if args.fp8 else "auto",
        max_num_seqs=info.max_num_seqs,
    )
    return predict(replica, Workload.of(rows, num_reused_prompt_tokens=reused)).seconds


def run(
    backend: Any, mix: str, count: int, *, first_id: int, most: int = 4096
) -> tuple[float, int, int]:
    """Run a mix, completions of `most` tokens at most; return seconds, prompt tokens and completion tokens."""
    from inference.request_mixes import requests, run_to_ends
    from inference.sampling import SamplingParams
    from inference.sequence import Sequence

    sequences = [
        Sequence(
            first_id + i, prompt, SamplingParams(max_tokens=min(most, length), ignore_eos=True)
        )
        for i, (prompt, length) in enumerate(requests(mix, count, seed=9 if not first_id else 0))
    ]
    elapsed_s = run_to_ends(backend, sequences)
    num_prompt = sum(len(s.prompt_token_ids) for s in sequences)
    return elapsed_s, num_prompt, sum(s.sampling.max_tokens for s in sequences)


def run_case(case: str, options: list[str], limit_s: float, logs: Path) -> dict[str, Any]:
    """Run one case in a process of its own; return its line, or what went wrong."""
    say(f"--- {case}")
    logs.mkdir(parents=True, exist_ok=True)
    result = logs / "result.json"
    result.unlink(missing_ok=True)
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__)), *options, "--one", str(result), case],
        env={"NCCL_DEBUG": "WARN", **os.environ, "NIGHTJAR_BENCH_LOGS": str(logs)},
    )
    try:
        code: int | None = child.wait(limit_s)
    except subprocess.TimeoutExpired:
        child.kill()  # its ranks end themselves: their socket closes
        child.wait()
        code = None
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text())
    else:
        found = {"error": f"no result within {limit_s:.0f} s" if code is None else f"exit {code}"}
    if "error" in found:
        for log in sorted(logs.glob("rank-*.log")):
            print(f"----- end of {log}\n{log.read_text(errors='replace')[-4000:]}", flush=True)
    return {"case": case, "options": options, **found}


def one(case: str, args: argparse.Namespace) -> None:
    """Measure one case in this process and write its result."""
    from inference.errors import InferenceError

    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        found = measure(case, args)
    except (InferenceError, AssertionError) as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    args.one.write_text(json.dumps(found))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", metavar="MODEL:RANKS:MIX:COUNT")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each case")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "bench-ranks")
    parser.add_argument("--eager", action="store_true", help="no graphs")
    parser.add_argument("--fp8", action="store_true", help="weights and KV cache")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--min-step-tokens", help="least target of a step, for ranks on a device")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.cases[0], args)
        return
    options = [f"--{name}" for name in ("eager", "fp8") if getattr(args, name)]
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if value := getattr(args, name):
            options += [f"--{name.replace('_', '-')}", str(value)]
    if args.min_step_tokens:
        os.environ["NIGHTJAR_BENCH_MIN_STEP_TOKENS"] = args.min_step_tokens
    for case in args.cases:
        logs = args.logs / case.replace(":", "-")
        found = run_case(case, options, args.limit, logs)
        print(json.dumps(found), flush=True)
        if "error" in found and "--eager" not in options:
            found = run_case(case, [*options, "--eager"], args.limit, logs)
            print(json.dumps(found), flush=True)
    say("end")


if __name__ == "__main__":
    main()
