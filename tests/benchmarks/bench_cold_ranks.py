"""A cold start of two ranks from a slow store: from the first request to ready, with and without overlap.

    python -m tests.benchmarks.bench_cold_ranks --mb 200 --mb-per-s 10 --rounds 2

A random model of several weight files lies in SeaweedFS, behind a proxy that lets through so much a second.
`whole first` waits for the whole model and starts the ranks then; `overlapped` starts them when config and
tokenizer are there, and they read each file once it is verified. Rounds alternate, each with an empty cache; both
must give the same tokens. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from inference.backends import create_backend
from inference.config import EngineConfig
from inference.sampling import SamplingParams
from inference.sequence import Sequence
from storage.object_store import StorageConfig
from tasks.job import EngineKnobs, HardwareConfig, InputConfig, ModelConfig, OutputConfig, RunConfig
from tasks.model import begin_model
from tasks.progress import Progress
from tests.faults.fault_proxy import FaultProxy
from tests.pipeline import MODELS
from tests.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed, make_bucket, put_model, running_seaweed

NUM_FILES = 8


def main() -> None:
    args = _arguments()
    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    found: dict[str, list[dict[str, Any]]] = {"whole first": [], "overlapped": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "server").mkdir()
        num_bytes = _save_model(folder / "model", args.mb)
        with running_seaweed(folder / "server") as port, FaultProxy(port) as proxy:
            source = put_model(Seaweed(port, make_bucket(port)), folder / "model")
            proxy.bytes_per_s = args.mb_per_s * 1e6
            for number in range(args.rounds):
                for way, rows in found.items():
                    cache = folder / f"{way} {number}"
                    job = _job(source, proxy.endpoint_url, cache)
                    rows.append(_start(job, is_overlapped=way == "overlapped"))
                    shutil.rmtree(cache)
    _print(args, num_bytes, found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=200, help="of weights, about")
    parser.add_argument("--mb-per-s", type=float, default=10.0, help="what the store gives")
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


def _save_model(folder: Path, mb: int) -> int:
    """Save a model of random weights in several files; return their bytes."""
    import torch
    import transformers

    torch.manual_seed(0)
    hidden, num_layers = 512, max(1, round((mb * 1e6 / 4 - 2 * 331 * 512) / (16 * 512**2)))
    config = transformers.Qwen3Config(
        vocab_size=331,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        max_position_embeddings=256,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size=f"{-(-mb // NUM_FILES)}MB")
    for path in (MODELS / "tiny-a").glob("tokenizer*"):
        shutil.copy(path, folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _job(source: str, endpoint_url: str, cache: Path) -> RunConfig:
    return RunConfig(
        name="cold",
        model=ModelConfig(source=source, dtype="float32"),
        input=InputConfig(uri="none"),
        output=OutputConfig(uri="none"),
        storage=StorageConfig(endpoint_url=endpoint_url, region="us-east-1"),
        engine=EngineKnobs(backend="paged", tensor_parallel_size=2),
        hardware=HardwareConfig(stage_to=str(cache)),
    )


def _start(job: RunConfig, *, is_overlapped: bool) -> dict[str, Any]:
    began = time.perf_counter()
    model = begin_model(job, progress=Progress())
    files = model.files()
    assert files is not None, "an empty cache is filled"
    if not is_overlapped:
        model.wait()
    staged_at = time.perf_counter()
    config = EngineConfig(
        model=str(model.path), backend="paged", dtype="float32", tensor_parallel_size=2
    )
    waited_before_s = files.waited_s
    backend = create_backend(config, arriving=files if is_overlapped else None)
    ranks_waited_s = files.waited_s - waited_before_s
    model.wait()
    ready_at = time.perf_counter()
    try:
        return {
            "ready_s": round(ready_at - began, 2),
            "before_ranks_s": round(staged_at - began, 2),
            "transfer_s": round(model.staged.report.phases["transfer"], 2),
            "ranks_waited_s": round(ranks_waited_s, 2),
            "tokens": _tokens(backend),
        }
    finally:
        backend.close()
        model.close()


def _tokens(backend: Any) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=16, ignore_eos=True)
    backend.submit(Sequence(i, [5, 6, 7 + i], sampling) for i in range(4))
    found = {}
    while backend.num_unfinished:
        found.update({c.seq_id: list(c.token_ids) for c in backend.step()})
    return [found[i] for i in range(4)]


def _print(
    args: argparse.Namespace, num_bytes: int, found: dict[str, list[dict[str, Any]]]
) -> None:
    kinds = {json.dumps(row.pop("tokens")) for rows in found.values() for row in rows}
    if len(kinds) != 1:
        raise SystemExit(f"{len(kinds)} different answers: loading while files come is wrong")
    medians = {
        way: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for way, rows in found.items()
    }
    print(
        f"{num_bytes / 1e6:.0f} MB at {args.mb_per_s:g} MB/s, 2 ranks; medians of {args.rounds}\n"
    )
    print(
        "| way | start to ready, s | of it before ranks were started | bytes on the wire, s | ranks waited for files, s |"
    )
    print("|---|---|---|---|---|")
    for way, row in medians.items():
        cells = (row["ready_s"], row["before_ranks_s"], row["transfer_s"], row["ranks_waited_s"])
        print(f"| {way} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    share = medians["overlapped"]["ready_s"] / medians["whole first"]["ready_s"]
    print(
        json.dumps(
            {
                "bench": "cold-ranks",
                "bytes": num_bytes,
                "overlapped_vs_whole": round(share, 3),
                "rounds": found,
            }
        )
    )


if __name__ == "__main__":
    main()
