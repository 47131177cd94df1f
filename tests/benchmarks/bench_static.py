"""How long the transformers backend takes for a request mix, on random weights.

    python tests/benchmarks/bench_static.py --model 8b --mixes chat:256

Loading comes first and is reported apart. Prints a line a mix, then one line of JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import torch
import transformers
from bench_engine import sequences_of
from random_model import SHAPES, config_of, write_folder

from inference.backends import create_backend
from inference.config import EngineConfig
from inference.tier import BITSANDBYTES
from tests.int4_checkpoints import SETTINGS, quantised_in_four_bits


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="0.6b")
    parser.add_argument("--mixes", default="chat:256")
    parser.add_argument("--quantization", choices=("none", *BITSANDBYTES), default="none")
    parser.add_argument("--stored-as", choices=SETTINGS, help="a checkpoint quantised so")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        model = write_folder(Path(folder) / "model", config_of(args.model), is_random=True)
        if args.stored_as:
            model, _ = quantised_in_four_bits(model, Path(folder), args.stored_as)
        backend = create_backend(
            EngineConfig(
                model=str(model),
                backend="transformers",
                quantization=args.quantization,
                dtype="float16" if args.stored_as else "auto",
            )
        )
    print(f"loaded in {backend.info.load_s:.1f} s; {backend.info}", flush=True)
    rows: list[dict[str, Any]] = []
    for entry in args.mixes.split(","):
        mix, count = entry.split(":")
        sequences = sequences_of(mix, int(count), 0.0)
        num_steps, started_at = backend.stats.num_steps, time.perf_counter()
        backend.submit(sequences)
        while backend.num_unfinished:
            backend.step()
        elapsed_s = time.perf_counter() - started_at
        num_steps = backend.stats.num_steps - num_steps
        row = {
            "mix": mix,
            "count": int(count),
            "s": round(elapsed_s, 2),
            "completion_tokens_per_s": round(
                sum(s.sampling.max_tokens for s in sequences) / elapsed_s
            ),
            "steps": num_steps,
            "ms_per_step": round(elapsed_s / num_steps * 1e3, 2),
        }
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"device": backend.info.device, **versions, **vars(args), "results": rows}))


if __name__ == "__main__":
    main()
