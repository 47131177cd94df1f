"""How much memory hostile and large inputs take in the feed's child, above what it needs to start."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.feed import FeedLimits
from tests.feed_bench import Bench, make_job

MiB = 1024 * 1024
LIMIT = 200 * MiB


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


class Watched:
    """A feed's child: its resident memory when it was ready, and its peak."""

    def __init__(self, feed):
        self.pid = feed._process._child.pid

    def _status(self, name):
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
        raise AssertionError(name)

    @property
    def now(self):
        return self._status("VmRSS")

    @property
    def peak(self):
        return self._status("VmHWM")


def peak_above_start(bench, path, num_rows):
    """Feed every row and return how far the child's memory rose, in bytes."""
    job = make_job(path, prompt_column="prompt")
    plan = bench.plan(job, "tiny-a")
    small = path.parent / "small.parquet"
    pq.write_table(pa.table({"prompt": ["x"]}), small)
    first = Bench(bench.work_dir)
    small_job = make_job(small, prompt_column="prompt")
    small_plan = first.plan(small_job, "tiny-a")
    with bench.open(job, "tiny-a") as feed:
        for _ in feed.read(small_plan, 0, 1):
            pass
        child = Watched(feed)
        start = child.now
        total = sum(len(batch.rows) for batch in feed.read(plan, 0, plan.num_rows))
        assert total == num_rows
        return child.peak - start


def words(num_bytes, seed):
    """Text that does not compress well."""
    rng = np.random.default_rng(seed)
    return rng.integers(97, 123, num_bytes, dtype=np.uint8).tobytes().decode()


@pytest.mark.slow
def test_one_row_group_of_hundreds_of_megabytes_takes_little_memory(bench, tmp_path):
    path = tmp_path / "large.parquet"
    pool = words(4_000_000, 1)
    num_rows = 50_000
    notes = pa.array([pool[n * 50 : n * 50 + 8000] for n in range(num_rows)])
    prompts = pa.array([f"prompt {n}" for n in range(num_rows)])
    pq.write_table(
        pa.table({"prompt": prompts, "note": notes}),
        path,
        row_group_size=num_rows,
        compression="zstd",
        use_dictionary=False,
    )
    assert notes.nbytes > 380_000_000
    used = peak_above_start(bench, path, num_rows)
    assert used < LIMIT


def test_a_dictionary_that_hides_gigabytes_takes_little_memory(bench, tmp_path):
    path = tmp_path / "dictionary.parquet"
    num_rows = 3000
    notes = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows), pa.array(["x" * MiB]))
    schema = pa.schema([("prompt", pa.string()), ("note", pa.string())])
    with pq.ParquetWriter(path, schema, use_dictionary=True) as writer:
        for first in range(0, num_rows, 100):
            piece = pa.table(
                {
                    "prompt": [f"p{n}" for n in range(first, first + 100)],
                    "note": notes.slice(first, 100).cast(pa.string()),
                }
            )
            writer.write_table(piece)
    assert path.stat().st_size < 4 * MiB
    job = make_job(path, prompt_column="prompt")
    plan = bench.plan(job, "tiny-a", limits=FeedLimits(memory_bytes=LIMIT))
    assert plan.num_rows == num_rows


def test_converting_a_large_text_file_takes_little_memory(bench, tmp_path):
    path = tmp_path / "large.jsonl"
    pool = [words(20_000, seed) for seed in range(20)]
    with path.open("w") as file:
        for n in range(5000):
            row = {"prompt": f"prompt {n}", "note": pool[n % 20][n % 997 :], "tags": [n, n + 1]}
            file.write(json.dumps(row) + "\n")
    assert path.stat().st_size > 90 * MiB
    # The address space is bounded, which bounds the resident memory too.
    plan = bench.plan(make_job(path), "tiny-a", limits=FeedLimits(memory_bytes=LIMIT))
    assert plan.num_rows == 5000
