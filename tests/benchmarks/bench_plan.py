"""How fast and in how much memory a run is planned.

Synthetic rows (a shared instruction, then seeded words with log-normal lengths) are written as
Parquet, then planned once with a warm disk cache: read, rendered by the chat template, tokenised,
checked, cut. Judged against 1 M tokens/s per processor core, and memory that does not grow with rows.

    python tests/benchmarks/bench_plan.py --rows 1000000 --model path/to/model
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from storage.manifest import RunRecord
from storage.memory_store import MemoryStore
from tasks.feed_spec import FeedLimits
from tasks.job import InputConfig, ModelConfig, OutputConfig, RunConfig
from tasks.plan import make_plan

TINY = Path(__file__).parent.parent / "data" / "models" / "chain-a"
INSTRUCTION = "Summarise the following note in one plain sentence for a busy reader.\n\n"
WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
    "this",
    "from",
    "have",
    "or",
    "by",
    "one",
    "had",
    "not",
    "but",
    "what",
    "all",
    "were",
    "when",
    "we",
    "there",
    "can",
    "an",
    "your",
    "which",
    "their",
    "said",
    "if",
    "do",
    "will",
    "each",
    "about",
    "how",
    "up",
    "out",
    "them",
    "then",
    "she",
    "many",
    "some",
    "so",
    "these",
    "would",
    "other",
    "into",
    "has",
    "more",
    "her",
    "two",
    "like",
    "him",
    "see",
    "time",
    "could",
    "no",
    "make",
    "than",
    "first",
    "been",
    "its",
    "who",
    "now",
    "people",
    "my",
    "made",
    "over",
    "did",
    "down",
    "only",
    "way",
    "find",
    "use",
    "may",
    "water",
    "long",
    "little",
    "very",
    "after",
    "words",
    "called",
    "just",
    "where",
    "most",
    "know",
    "river",
    "granite",
    "orchard",
    "delta",
    "engine",
]


def write_rows(path: Path, num_rows: int) -> None:
    """Write seeded prompts, 20 000 to a row group."""
    rng = random.Random(7)
    schema = pa.schema([("id", pa.int64()), ("prompt", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(0, num_rows, 20_000):
            ids = range(first, min(num_rows, first + 20_000))
            prompts = [
                INSTRUCTION
                + " ".join(rng.choices(WORDS, k=max(3, int(rng.lognormvariate(4, 0.6)))))
                for _ in ids
            ]
            writer.write_table(pa.table({"id": list(ids), "prompt": prompts}, schema=schema))


def main() -> None:
    """Print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        write_rows(path, args.rows)
        job = RunConfig(
            model=ModelConfig(source=str(args.model)),
            input=InputConfig(uri=str(path), id_column="id"),
            output=OutputConfig(uri="memory://bench"),
        )
        record = RunRecord(
            run_id="bench",
            name="bench",
            fingerprint="bench",
            fingerprint_fields={},
            job={},
            versions={},
            created_at="",
        )
        limits = FeedLimits() if args.threads is None else FeedLimits(num_threads=args.threads)
        before = resource.getrusage(resource.RUSAGE_SELF)
        started = time.perf_counter()
        plan = make_plan(
            job=job,
            record=record,
            store=MemoryStore(),
            model_dir=args.model,
            work_dir=Path(folder),
            max_model_len=args.max_model_len,
            limits=limits,
        )
        elapsed_s = time.perf_counter() - started
    own = resource.getrusage(resource.RUSAGE_SELF)
    child = resource.getrusage(resource.RUSAGE_CHILDREN)
    own_cpu_s = own.ru_utime + own.ru_stime - before.ru_utime - before.ru_stime
    cpu_s = own_cpu_s + child.ru_utime + child.ru_stime
    result = {
        "benchmark": "plan",
        "model": args.model.name,
        "num_rows": plan.num_rows,
        "num_prompt_tokens": plan.num_prompt_tokens,
        "num_shards": plan.num_shards,
        "elapsed_s": round(elapsed_s, 2),
        "cpu_s": round(cpu_s, 2),
        "rows_per_s": round(plan.num_rows / elapsed_s),
        "tokens_per_s": round(plan.num_prompt_tokens / elapsed_s),
        "tokens_per_cpu_s": round(plan.num_prompt_tokens / cpu_s),
        "parent_peak_mb": round(own.ru_maxrss / 1024),
        "child_peak_mb": round(child.ru_maxrss / 1024),
    }
    for name, value in result.items():
        print(f"{name:>20}  {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
