"""How close a model larger than the device comes to what the bus allows.

    python tests/benchmarks/bench_zero.py --shape 32b --limit-gb 40 --folder /tmp/zero

Caps what the device may hold, and runs the zero backend over one full batch. The weights are zeros, from a file that
is a hole: what is measured is moving them. With `--random` they are random, and the completions are compared with those
of the transformers backend, before any cap, on the whole model, which must fit; both with torch's plain attention,
for its fused kernels give one query other bits from run to run. A decode pass moves every weight once, so its time is held against the
weights' bytes at the measured bandwidth of pinned copies. The folder should be on a disk: pages of a hole that are
read in /dev/shm take memory. Prints what happens when, a table, then one line of JSON.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch
from random_model import SHAPES, config_of, write_folder

from inference import zero
from inference.backends.transformers import TransformersBackend
from inference.backends.zero import ZeroBackend
from inference.config import EngineConfig
from inference.sampling import SamplingParams
from inference.sequence import Sequence

STARTED_AT = time.monotonic()


def say(text: str) -> None:
    """Print a line with the seconds since this process began."""
    print(f"[{time.monotonic() - STARTED_AT:6.1f} s] {text}", flush=True)


def copy_bandwidth(num_bytes: int = 1 << 30) -> float:
    """Bytes a second from pinned host memory to the device; of a host copy without one."""
    is_cuda = torch.cuda.is_available()
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
    device = torch.empty_like(host, device="cuda" if is_cuda else "cpu")
    times = []
    for _ in range(5):
        started_at = time.perf_counter()
        device.copy_(host, non_blocking=True)
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started_at)
    return num_bytes / min(times)


def leave_fused_attention() -> None:
    """Use torch's plain attention from here on, which gives the same bits whenever it runs."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def sequences_of(args: argparse.Namespace) -> list[Sequence]:
    """Return rows of one length, each with a prompt of its own."""
    sampling = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    return [
        Sequence(i, [3 + (7 * i + 11 * k) % 250 for k in range(args.prompt)], sampling)
        for i in range(args.rows)
    ]


def reference(args: argparse.Namespace) -> dict[int, tuple[int, ...]]:
    """Return the completions of the whole model on the device, in one batch as `zero` runs them."""
    backend = TransformersBackend(
        EngineConfig(
            model=str(args.folder),
            backend="transformers",
            offload="none",
            max_num_seqs=args.rows,
            max_num_batched_tokens=args.rows * (args.prompt + args.tokens),
        )
    )
    say(f"loaded: {backend.info}")
    backend.submit(sequences_of(args))
    tokens: dict[int, tuple[int, ...]] = {}
    while backend.num_unfinished:
        tokens |= {done.seq_id: done.token_ids for done in backend.step()}
    backend.close()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(f"{len(tokens)} rows by the reference")
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--limit-gb", type=float, help="most the device may hold")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--unmended", action="store_true", help="DeepSpeed's own way of fetching")
    parser.add_argument("--offload", default="cpu")
    parser.add_argument("--nvme-path")
    parser.add_argument("--random", action="store_true", help="weights, and compare the tokens")
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    config = config_of(args.shape, layers=args.layers)
    write_folder(args.folder, config, is_random=args.random)
    if args.random:
        leave_fused_attention()
    expected = reference(args) if args.random else {}
    bandwidth = copy_bandwidth()
    say(f"pinned copies reach {bandwidth / 1e9:.1f} GB/s")
    if args.unmended:
        zero.mend_fetching = lambda: None
    if args.limit_gb and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.limit_gb * 1e9 / total)
    backend = ZeroBackend(
        EngineConfig(
            model=str(args.folder),
            backend="zero",
            offload=args.offload,
            nvme_path=args.nvme_path,
            max_num_seqs=args.rows,
        )
    )
    say(f"loaded: {backend.info}")
    backend.submit(sequences_of(args))
    tokens: dict[int, tuple[int, ...]] = {}
    passes: list[float] = []
    started_at = time.perf_counter()
    while backend.num_unfinished:
        before = backend.stats.decode_s
        tokens |= {done.seq_id: done.token_ids for done in backend.step()}
        if backend.stats.decode_s > before:
            passes.append(backend.stats.decode_s - before)
        if not backend.num_unfinished or len(passes) % 4 == 0:
            say(f"{len(passes)} decode passes, {backend.stats.prefill_s:.1f} s of prefill")
    elapsed_s = time.perf_counter() - started_at
    weights = sum(backend.info.memory.values())
    pass_s = statistics.median(passes[2:])
    found = {
        "device": backend.info.device,
        "weights_gb": round(weights / 1e9, 2),
        "load_s": round(backend.info.load_s, 1),
        "rows": args.rows,
        "pass_s": round(pass_s, 3),
        "all_pass_s": [round(seconds, 3) for seconds in passes],
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "share_of_bus": round(weights / bandwidth / pass_s, 3),
        "completion_tokens_per_s": round(backend.stats.num_completion_tokens / elapsed_s, 1),
        "prefill_s": round(backend.stats.prefill_s, 1),
        "peak_device_gb": round(backend.stats.peak_device_bytes / 1e9, 2),
    }
    if args.random:
        found["rows_as_reference"] = sum(tokens[i] == expected[i] for i in expected)
        found["first_tokens_as_reference"] = sum(tokens[i][0] == expected[i][0] for i in expected)
        found["different_tokens"] = len({token for row in expected.values() for token in row})
    backend.close()
    for name, value in found.items():
        print(f"{name:28} {value}")
    print(json.dumps({**vars(args), **found}, default=str))


if __name__ == "__main__":
    main()
