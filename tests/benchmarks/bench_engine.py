"""How long the paged engine takes for a request mix, on random weights built on the device.

    python tests/benchmarks/bench_engine.py --model 8b --mixes uniform:256,chat:1024 --repeat 3

Judged against vLLM on the same card and mixes, and against the serial limit: GEMMs at the card's rate, keys and
values read once a step. Warm-up (kernel compilation, graphs, a small mix) comes first and is reported apart.
Prints a table, then one line of JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import torch
import transformers
from random_model import SHAPES, config_of, write_folder

from inference.backends.row import Row
from inference.build_engine import build_engine
from inference.config import EngineConfig
from inference.loading import load_model
from inference.model import PagedModel, make_paged_model
from inference.paged_settings import PagedSettings
from inference.request_mixes import requests, run_to_ends
from inference.sampling import SamplingParams
from inference.sequence import Sequence
from inference.tier import BITSANDBYTES
from inference.weights import check_model_folder


def build(args: argparse.Namespace) -> Any:
    """Return an engine over random weights of the model's shape."""
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    if args.bitsandbytes:
        model = through_bitsandbytes(args.model, args.bitsandbytes, device)
    else:
        model = random_weights(args.model, device)
    ops: Any
    if is_cuda:
        from inference.kernels import fused as ops
    else:
        from inference.kernels import plain as ops
    if args.unfused:
        paged = PagedModel(model, ops)
    else:
        paged = make_paged_model(model, ops, is_fp8=args.fp8)
    engine_config = EngineConfig(
        model="random",
        max_num_seqs=args.max_num_seqs or "auto",
        max_num_batched_tokens=args.max_num_batched_tokens or "auto",
        kv_cache_dtype=args.kv_cache_dtype,
        enforce_eager=args.eager,
    )
    settings = PagedSettings.of(engine_config, paged)
    if args.min_step_tokens is not None:
        import dataclasses

        settings = dataclasses.replace(settings, min_step_tokens=args.min_step_tokens or None)
    return build_engine(paged, settings, make_row)


def random_weights(name: str, device: torch.device) -> Any:
    """Return a transformers model with random weights."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return transformers.AutoModelForCausalLM.from_config(config_of(name), dtype=dtype).eval()


def through_bitsandbytes(name: str, quantization: Any, device: torch.device) -> Any:
    """Return such a model as the engine loads it from a folder with `quantization`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        write_folder(Path(folder), config_of(name), is_random=True)
        config = EngineConfig(model=folder, quantization=quantization)
        return load_model(check_model_folder(Path(folder)), config, {"": device})


def make_row(sequence: Sequence) -> Row:
    """Return a row without a tokenizer: what is measured here is the engine."""
    return Row(sequence, lambda ids: "", (), (), sequence.sampling.max_tokens)


def sequences_of(mix: str, count: int, temperature: float) -> list[Sequence]:
    """Return a mix as sequences whose completions have a forced length."""
    return [
        Sequence(
            i,
            prompt,
            SamplingParams(max_tokens=length, ignore_eos=True, temperature=temperature),
            draw_seed=i,
        )
        for i, (prompt, length) in enumerate(requests(mix, count))
    ]


def run(engine: Any, sequences: list[Sequence]) -> float:
    """Run sequences to their ends; return the seconds it took."""
    engine.scheduler.forget_prefixes()  # each run prefills its prompts anew
    return run_to_ends(engine, sequences)


def profile(engine: Any, sequences: list[Sequence], first: int, count: int) -> None:
    """Print the kernels that take longest in `count` steps after the first ones."""
    engine.scheduler.forget_prefixes()
    engine.submit(sequences)
    for _ in range(first):
        engine.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    started_at = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(count):
            engine.step()
        torch.cuda.synchronize()
    elapsed_ms = (time.perf_counter() - started_at) * 1e3
    while engine.num_unfinished:
        engine.step()
    events = [
        (e.start_ns() / 1e6, (e.start_ns() + e.duration_ns()) / 1e6, e.name())
        for e in profiler.profiler.kineto_results.events()
        if e.device_type() == torch.autograd.DeviceType.CUDA
    ]
    print_events(sorted(events), count, elapsed_ms)


def print_events(events: list[tuple[float, float, str]], count: int, elapsed_ms: float) -> None:
    """Print kernels (start ms, end ms, name) by the time only they run, and the gaps between them."""
    alone: dict[str, list[float]] = {}
    gaps: dict[str, list[float]] = {}
    reached, last = events[0][0], ""
    idle = 0.0
    for start, end, name in events:
        name = name[:60]
        if start > reached:
            idle += start - reached
            gaps.setdefault(f"{last[:34]} -> {name[:34]}", []).append(start - reached)
        alone.setdefault(name, []).append(max(0.0, end - max(start, reached)))
        if end > reached:
            reached, last = end, name
    print(f"{count} steps: {elapsed_ms / count:.2f} ms a step, idle {idle / count:.2f} ms")
    for table, size in ((alone, 16), (gaps, 14)):
        for name, times in sorted(table.items(), key=lambda item: -sum(item[1]))[:size]:
            print(f"  {sum(times) / count:7.3f} ms  {len(times) / count:6.1f}x  {name}")


def profile_host(engine: Any, sequences: list[Sequence]) -> None:
    """Print where the host's time goes in one run."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.runcall(run, engine, sequences)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(24)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="0.6b")
    parser.add_argument("--mixes", default="uniform:256,chat:1024,template:1024")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument("--fp8", action="store_true")
    parser.add_argument("--bitsandbytes", choices=BITSANDBYTES)
    layers.add_argument("--unfused", action="store_true", help="the model class's own layers")
    parser.add_argument("--eager", action="store_true", help="no graphs")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--min-step-tokens", type=int)
    parser.add_argument("--profile", default="", help="mix:count:first step:steps")
    parser.add_argument("--profile-host", default="", help="mix:count")
    args = parser.parse_args()
    started_at = time.perf_counter()
    engine, plan, warmup_s = build(args)
    build_s = time.perf_counter() - started_at
    print(f"built in {build_s:.1f} s, of which warm-up {warmup_s:.1f} s; {plan}", flush=True)
    if not args.eager and args.bitsandbytes != "int8":  # of which no graphs are captured
        run(engine, sequences_of("chat", 64, args.temperature))
        run(engine, sequences_of("template", 64, args.temperature))
    rows = []
    for entry in args.mixes.split(","):
        mix, count = entry.split(":")
        sequences = sequences_of(mix, int(count), args.temperature)
        num_prompt = sum(len(s.prompt_token_ids) for s in sequences)
        num_completion = sum(s.sampling.max_tokens for s in sequences)
        times, steps, waits = [], [], []
        for _ in range(args.repeat):
            before, wait_s = engine.stats.num_steps, engine.stats.extra["wait_s"]
            times.append(run(engine, sequences))
            steps.append(engine.stats.num_steps - before)
            waits.append(engine.stats.extra["wait_s"] - wait_s)
        elapsed_s = statistics.median(times)
        host_ms = (times[-1] - waits[-1]) / steps[-1] * 1e3
        row = {
            "mix": mix,
            "count": int(count),
            "s": round(elapsed_s, 2),
            "all_s": [round(t, 2) for t in times],
            "completion_tokens_per_s": round(num_completion / elapsed_s),
            "tokens_per_s": round((num_prompt + num_completion) / elapsed_s),
            "steps": steps[-1],
            "host_ms_per_step": round(host_ms, 3),
        }
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    for entry in filter(None, args.profile.split(",")):
        mix, count, first, steps_ = entry.split(":")
        profile(engine, sequences_of(mix, int(count), 0.0), int(first), int(steps_))
    if args.profile_host:
        mix, count = args.profile_host.split(":")
        profile_host(engine, sequences_of(mix, int(count), 0.0))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    settings = {k: v for k, v in vars(args).items() if k != "mixes"}
    print(
        json.dumps({"device": name, **versions, **settings, "warmup_s": warmup_s, "results": rows})
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
