"""Where greedy completions in 16 bits part from those in fp32, and from each other: engines and batch sizes.

    python tests/benchmarks/bench_divergence.py MODEL_FOLDER --rows 128 --tokens 64 --batches 16 128 [--dtype bfloat16] [--fp8]

Rounding decides near ties, so no two ways to compute in 16 bits agree for ever; transformers does not agree with
itself between batch sizes. The paged engine is held against that: its completions should part from the fp32 ones no
earlier than those of transformers do, alone or in a batch. Prints a table (rows that are the same to their end, the
share of tokens before the first difference, and the token at which half of the rows have parted), then one line of JSON.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from inference import LLM, SamplingParams

TOPICS = (
    *(
        "the moon",
        "bread",
        "a lighthouse",
        "prime numbers",
        "the heart",
        "rust on iron",
        "chess",
        "rain",
    ),
    *(
        "a violin",
        "glaciers",
        "bees",
        "the printing press",
        "tides",
        "a compass",
        "coral reefs",
        "sleep",
    ),
)
TASKS = (
    "Explain {} to a ten-year-old in a few sentences.",
    "Write a short story about {}.",
    "List five surprising facts about {}.",
    "What would happen if there were no such thing as {}? Answer in one paragraph.",
    "Write a letter to a friend who has never heard of {}.",
    "What do most people get wrong about {}?",
    "Describe {} without using its name.",
    "Compare {} with something that seems to have nothing to do with it.",
)


def completions(model: str, num_rows: int, num_tokens: int, **engine: Any) -> list[list[int]]:
    """Greedy completions of the first rows of the tasks about the topics, in order."""
    texts = [task.format(topic) for task in TASKS for topic in TOPICS][:num_rows]
    with LLM(model, **engine) as llm:
        found = llm.chat(
            [[{"role": "user", "content": text}] for text in texts],
            SamplingParams(max_tokens=num_tokens, ignore_eos=True),
        )
    failed = [completion.error for completion in found if completion.finish_reason == "error"]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(found)} rows failed: {failed[0]}")
    return [list(completion.token_ids) for completion in found]


def parting(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """How far two sets of completions go together."""
    together = []
    for mine, other in zip(ours, theirs, strict=True):
        pairs = enumerate(zip(mine, other, strict=True))
        together.append(next((place for place, (a, b) in pairs if a != b), len(mine)))
    lengths = [len(row) for row in ours]
    return {
        "same_rows": round(sum(map(int.__eq__, together, lengths)) / len(ours), 3),
        "share_before": round(sum(together) / sum(lengths), 3),
        "median_token": statistics.median(together),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model folder with a chat template")
    parser.add_argument("--rows", type=int, default=len(TOPICS) * len(TASKS))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[16], help="rows at once, of transformers"
    )
    parser.add_argument("--fp8", action="store_true", help="the paged engine's fp8 too (CUDA)")
    args = parser.parse_args()

    ways: dict[str, dict[str, Any]] = {
        "fp32": {"backend": "transformers", "dtype": "float32", "max_num_seqs": args.batches[0]},
        "transformers, one row": {"backend": "transformers", "max_num_seqs": 1},
        **{
            f"transformers, {size} rows": {"backend": "transformers", "max_num_seqs": size}
            for size in args.batches
        },
        "paged": {"backend": "paged", "max_model_len": 1024},
    }
    if args.fp8:
        ways["paged, fp8"] = {**ways["paged"], "quantization": "fp8", "kv_cache_dtype": "fp8"}
    found = {
        name: completions(args.model, args.rows, args.tokens, **{"dtype": args.dtype, **engine})
        for name, engine in ways.items()
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, {args.dtype}, {args.rows} rows of {args.tokens} tokens")
    names = list(ways)
    table = {
        f"{name} | {other}": parting(found[name], found[other])
        for place, other in enumerate(names)
        for name in names[place + 1 :]
    }
    for name, numbers in table.items():
        print(f"{name:45} {numbers}", flush=True)
    print(json.dumps({"benchmark": "divergence", "device": device, **vars(args), **table}))


if __name__ == "__main__":
    main()
