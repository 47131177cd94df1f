"""Is a job's second run forecast by its first? Two nights of one job, end to end, on real files.

    python -m tests.benchmarks.bench_forecast --model 8b --rows 4096 --folder /dev/shm --bare-mix
    python -m tests.benchmarks.bench_forecast --model tiny --rows 700 --longest 24

Writes a model folder with random weights and two tables of prompts of the chat mix (other rows each night,
completions forced to their length), then, each in a process of its own: the engine alone, from process start to
its first token; `nightjar run` on the first table; `nightjar plan` of the second; `nightjar run` on the second.
`--bare-mix` runs the first table through the engine alone, too. The last line is JSON.
"""

import argparse
import json
import math
import mmap
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from inference.request_mixes import Request, requests

ROOT = Path(__file__).parents[2]
VOCABULARY = 151_936
MAX_MODEL_LEN = 4096
SHARD_BYTES = 4e9
BARS = {"p50_error": 0.15, "start_s": 20.0, "phases": 0.02}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
_BEGAN = time.monotonic()


def main() -> None:
    args = _arguments()
    if args.write:
        print(json.dumps({"num_bytes": write_model(Path(args.write), args.model)}))
        return
    if args.bare:
        print(json.dumps(bare(args)))
        return
    with tempfile.TemporaryDirectory(prefix="forecast-", dir=args.folder) as name:
        folder = Path(name)
        found = nights(args, folder)
    print(json.dumps({"bench": "forecast", "model": args.model, "rows": args.rows, **found}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="8b")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--shard-rows", type=int, default=1024)
    parser.add_argument("--folder", default=None, help="where models and results are written")
    parser.add_argument("--bare-mix", action="store_true", help="the engine alone on the mix too")
    parser.add_argument("--threads", type=int, help="processor threads of torch, on the CPU")
    parser.add_argument(
        "--longest", type=int, default=2048, help="tokens, of prompts and completions"
    )
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def nights(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Do everything; return what was measured."""
    with phase("writing the model"):
        weight_bytes = call([*_self(args), "--write", str(folder / "model")])["num_bytes"]
        say(f"{weight_bytes / 1e9:.2f} GB of weights in {folder}")
    jobs = [write_job(args, folder, night) for night in (1, 2)]
    with phase("the engine alone"):
        alone = call([*_self(args), "--bare", str(folder / "model"), "--since", str(time.time())])
        alone["load_gb_per_s"] = round(weight_bytes / alone["load_s"] / 1e9, 2)
        say(json.dumps(alone))
    with phase("first night"):
        first = run_night(jobs[0])
        say(json.dumps(first))
    with phase("plan of the second night"):
        expected = call([*NIGHTJAR, "plan", str(jobs[1]), "--json"])["forecast"]
        say(expected["sentence"])
    with phase("second night"):
        second = run_night(jobs[1])
        say(json.dumps(second))
    say_gpu_metrics(folder)
    error = expected["seconds_p50"] / second["published_s"] - 1
    found = {
        "forecast_p50_s": expected["seconds_p50"],
        "forecast_p90_s": expected["seconds_p90"],
        "published_s": second["published_s"],
        "p50_error": round(error, 4),
        "is_covered_by_p90": second["published_s"] <= expected["seconds_p90"],
        "alone": alone,
        "nights": [first, second],
    }
    meets = {
        "p50": abs(error) <= BARS["p50_error"],
        "p90": found["is_covered_by_p90"],
        "start": alone["first_token_s"] <= BARS["start_s"],
        "phases": max(n["phases_off_by"] for n in (first, second)) <= BARS["phases"],
    }
    if "tokens_per_s" in alone:
        found["engine_share"] = round(second["engine_tokens_per_s"] / alone["tokens_per_s"], 4)
    return {**found, "meets": meets}


NIGHTJAR = [sys.executable, "-m", "flows.cli"]


def _self(args: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_forecast"]
    command += ["--model", args.model, "--rows", str(args.rows)]
    command += ["--longest", str(args.longest)]
    command += ["--threads", str(args.threads)] if args.threads else []
    return [*command, *(["--bare-mix"] if args.bare_mix else [])]


def call(command: list[str]) -> dict[str, Any]:
    """Run a command that ends with one JSON line; return that."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        assert child.stdout is not None
        for line in child.stderr:  # standard output is one line at the end, which a pipe holds
            say(f"  | {line.rstrip()}")
        out = child.stdout.read()
    if child.returncode:
        raise SystemExit(f"{command}: exit code {child.returncode}\n{out}")
    document: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return document


def say(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", flush=True)


@contextmanager
def phase(name: str) -> Iterator[None]:
    began = time.monotonic()
    say(f"{name} ...")
    yield
    say(f"{name}: {time.monotonic() - began:.1f} s")


# ---- the model


def write_model(folder: Path, name: str) -> int:
    """Write config, tokenizer and random weights as a model hub's folder has them; return their bytes."""
    import torch
    import transformers

    folder.mkdir()
    is_cuda = torch.cuda.is_available()
    config = transformers.Qwen3Config(
        **SHAPES[name],
        vocab_size=VOCABULARY,
        max_position_embeddings=40_960,
        tie_word_embeddings=name != "8b",
        dtype="bfloat16" if is_cuda else "float32",
        bos_token_id=None,
        eos_token_id=1,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    write_tokenizer(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    item_bytes = 2 if is_cuda else 4
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for key, shape in sorted(shapes.items()):
        if sum(map(math.prod, shards[-1].values())) * item_bytes > SHARD_BYTES:
            shards.append({})
        shards[-1][key] = shape
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with ThreadPoolExecutor(len(shards)) as pool:
        list(pool.map(lambda i: write_weights(folder / names[i], shards[i]), range(len(shards))))
    weight_map = {key: names[i] for i, shard in enumerate(shards) for key in shard}
    num_bytes = item_bytes * sum(map(math.prod, shapes.values()))
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_bytes


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write one safetensors file of random tensors, made where they are made fastest."""
    import torch

    device, dtype = (
        ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        code = "BF16" if dtype == torch.bfloat16 else "F32"
        header[key] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    with path.open("w+b") as file:
        file.truncate(data + end)
        with mmap.mmap(file.fileno(), data + end) as mapping:
            mapping[:data] = struct.pack("<Q", len(text)) + text
            for key, shape in shapes.items():
                start, stop = header[key]["data_offsets"]
                tensor = torch.ones(shape, dtype=dtype, device=device)
                if len(shape) > 1:
                    tensor.normal_(std=0.02)
                target = torch.frombuffer(
                    mapping, dtype=torch.uint8, count=stop - start, offset=data + start
                )
                target.view(dtype).view(shape).copy_(tensor)
                del target  # a mapping in use cannot be closed


def write_tokenizer(folder: Path) -> None:
    """One word for each token, so that prompts have the lengths of the mix to the token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)


# ---- the nights


def mix_of(args: argparse.Namespace, night: int) -> list[Request]:
    """The requests of one night."""
    longest = args.longest
    return [
        (prompt[:longest], min(length, longest))
        for prompt, length in requests("chat", args.rows, seed=night)
    ]


def write_job(args: argparse.Namespace, folder: Path, night: int) -> Path:
    """Write a night's prompts and its job file."""
    mix = mix_of(args, night)
    texts = [" ".join(f"w{token}" for token in prompt) for prompt, _ in mix]
    limits = pa.array([length for _, length in mix], pa.int32())
    table = pa.table({"prompt": texts, "max_tokens": limits})
    pq.write_table(table, folder / f"night-{night}.parquet", row_group_size=512)
    job = {
        "name": "forecast",
        "model": {"source": str(folder / "model")},
        "input": {
            "uri": str(folder / f"night-{night}.parquet"),
            "prompt_column": "prompt",
            "chat_template": "none",
        },
        "sampling": {"max_tokens": 1024, "ignore_eos": True},
        "shards": {"max_rows": args.shard_rows},
        "engine": {"backend": "paged", "max_model_len": MAX_MODEL_LEN},
        "canary": {"max_repetitive_rate": None},  # random weights go in circles
        "metrics": {"textfile_dir": str(folder / "metrics")},
        "hardware": {"price_per_hour": 2.5},
        "output": {"uri": str(folder / "results")},
    }
    path = folder / f"night-{night}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def run_night(job: Path) -> dict[str, Any]:
    """Run a job as a user does; return what its receipts and manifest say beside the clock."""
    began_at, began = time.time(), time.monotonic()
    document = call([*NIGHTJAR, "run", str(job), "--json"])
    elapsed_s = time.monotonic() - began
    run = Path(document["run"])
    check_lengths(run)
    manifest = json.loads((run / "manifest.json").read_text())
    commits = [json.loads(path.read_text()) for path in (run / "commits").glob("*.json")]
    receipts = [commit["receipt"] for commit in commits]
    seconds = manifest["totals"]["replica_seconds"]
    accounted_s = sum(receipt["wall_s"] for receipt in receipts)
    engine_s = sum(seconds[name] for name in ("prefill", "decode", "tail"))
    return {
        "exit_s": round(elapsed_s, 2),
        "published_s": round((run / "manifest.json").stat().st_mtime - began_at, 2),
        "accounted_s": round(accounted_s, 2),
        "num_shards": len(receipts),
        "phases_off_by": max(map(phases_off_by, receipts)),
        "seconds": seconds,
        "completion_tokens": manifest["num_completion_tokens"],
        "run_tokens_per_s": round(manifest["num_completion_tokens"] / elapsed_s),
        "engine_tokens_per_s": round(manifest["num_completion_tokens"] / engine_s),
        "roofline": manifest["totals"]["roofline"],
        "summary": manifest["totals"]["summary"],
        "usd": manifest["totals"]["usd"],
        "peak_device_bytes": max(r["peak_device_bytes"] for r in receipts),
        "num_preemptions": sum(r["num_preemptions"] for r in receipts),
        "device": [receipt["device"] for receipt in receipts],
        "engine": receipts[-1]["engine"],
    }


def phases_off_by(receipt: dict[str, Any]) -> float:
    """By what share the phases miss the wall time, beyond what rounding each to 0.1 ms can do."""
    seconds = receipt["seconds"].values()
    missed = abs(sum(seconds) - receipt["wall_s"]) - 0.5e-4 * (len(seconds) + 1)
    return round(max(0.0, missed) / receipt["wall_s"], 4) if receipt["wall_s"] else 0.0


def check_lengths(run: Path) -> None:
    """Every row has as many completion tokens as it asked for."""
    columns = ["max_tokens", "num_completion_tokens", "state"]
    table = pq.read_table(run / "completions", columns=columns)
    rows = table.to_pylist()
    wrong = [row for row in rows if row["num_completion_tokens"] != row["max_tokens"]]
    if wrong or not rows:
        raise SystemExit(f"{len(wrong)} of {len(rows)} rows of another length, first {wrong[:1]}")


def say_gpu_metrics(folder: Path) -> None:
    """What a Prometheus would have seen of the GPU at the end."""
    for path in sorted((folder / "metrics").glob("*.prom")):
        lines = path.read_text().splitlines()
        for line in lines:
            if line.startswith("nightjar_gpu"):
                say(f"{path.name}: {line}")


# ---- the engine alone


def bare(args: argparse.Namespace) -> dict[str, Any]:
    """Start the engine on the folder, make one token, then the mix if asked for."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.cuda.is_available() and torch.zeros(1, device="cuda")
    imported_s = time.time() - args.since

    from inference.backends import create_backend
    from inference.config import EngineConfig
    from inference.sampling import SamplingParams
    from inference.sequence import Sequence

    was_there = kernels_found()
    engine = create_backend(
        EngineConfig(model=args.bare, backend="paged", max_model_len=MAX_MODEL_LEN)
    )
    engine.submit([Sequence(0, [200, 300, 400], SamplingParams(max_tokens=1), draw_seed=0)])
    while engine.num_unfinished:
        engine.step()
    first_token_s = time.time() - args.since
    info = engine.info
    found = {
        "first_token_s": round(first_token_s, 2),
        "imports_s": round(imported_s, 2),
        "load_s": round(info.load_s - info.compile_wait_s, 2),
        "compile_wait_s": round(info.compile_wait_s, 2),
        "warm_up_s": round(info.warmup_s, 2),
        "first_step_s": round(first_token_s - imported_s - info.load_s - info.warmup_s, 2),
        "kernels_compiled": was_there.count(False),
        "kernels_found": was_there.count(True),
        "memory": info.memory,
        "device": info.device,
    }
    if args.bare_mix:
        mix = mix_of(args, 1)
        began = time.monotonic()
        engine.submit(
            Sequence(i, prompt, SamplingParams(max_tokens=length, ignore_eos=True), draw_seed=i)
            for i, (prompt, length) in enumerate(mix)
        )
        while engine.num_unfinished:
            engine.step()
        found["mix_s"] = round(time.monotonic() - began, 2)
        found["tokens_per_s"] = round(sum(length for _, length in mix) / found["mix_s"])
    engine.close()
    return found


def kernels_found() -> list[bool]:
    """Return a list that gets one entry for each kernel from now on: whether Triton's cache on disk had it."""
    import torch

    was_there: list[bool] = []
    if torch.cuda.is_available():
        import triton

        triton.knobs.compilation.listener = lambda *, cache_hit, **_: was_there.append(cache_hit)
    return was_there


if __name__ == "__main__":
    main()
