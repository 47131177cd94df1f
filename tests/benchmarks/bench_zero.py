"""How close a model larger than the device comes to what the bus allows, on random weights.

    python tests/benchmarks/bench_zero.py --shape 32b --layers 16 --limit-gb 10 --folder /dev/shm/zero

Writes a model of random weights, caps what the device may hold, and runs the zero backend over one full batch.
A decode pass moves every weight once, so its time is held against the weights' bytes at the measured bandwidth of
pinned copies. Prints a table, then one line of JSON.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch
import transformers

from inference.backends.zero import ZeroBackend
from inference.config import EngineConfig
from inference.sampling import SamplingParams
from inference.sequence import Sequence

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32},
    "32b": {"hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64},
    "tiny": {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8},
}


def write_model(folder: Path, shape: str, layers: int) -> None:
    config = transformers.Qwen3Config(
        **SHAPES[shape],
        num_hidden_layers=layers,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936 if shape != "tiny" else 512,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    shutil.copy(ROOT / "tests" / "data" / "models" / "tiny-a" / "tokenizer.json", folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--limit-gb", type=float, help="most the device may hold")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--offload", default="cpu")
    parser.add_argument("--nvme-path")
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    write_model(args.folder, args.shape, args.layers)
    bandwidth = copy_bandwidth()
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
    sampling = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    backend.submit(
        Sequence(i, [3 + (7 * i + 11 * k) % 250 for k in range(args.prompt)], sampling)
        for i in range(args.rows)
    )
    passes: list[float] = []
    started_at = time.perf_counter()
    while backend.num_unfinished:
        before = backend.stats.decode_s
        backend.step()
        if backend.stats.decode_s > before:
            passes.append(backend.stats.decode_s - before)
    elapsed_s = time.perf_counter() - started_at
    weights = sum(backend.info.memory.values())
    pass_s = statistics.median(passes[2:])
    found = {
        "device": backend.info.device,
        "weights_gb": round(weights / 1e9, 2),
        "load_s": round(backend.info.load_s, 1),
        "pass_s": round(pass_s, 3),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "share_of_bus": round(weights / bandwidth / pass_s, 3),
        "completion_tokens_per_s": round(backend.stats.num_completion_tokens / elapsed_s, 1),
        "prefill_s": round(backend.stats.prefill_s, 1),
        "peak_device_gb": round(backend.stats.peak_device_bytes / 1e9, 2),
    }
    backend.close()
    for name, value in found.items():
        print(f"{name:28} {value}")
    print(json.dumps({**vars(args), **found}, default=str))


if __name__ == "__main__":
    main()
