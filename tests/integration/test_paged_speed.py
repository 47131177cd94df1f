"""The paged engine is no slower than static batches where there is no GPU, and gives the same tokens."""

import os
from pathlib import Path

import pytest

from tests.benchmarks.bench_cpu import compare

MODEL = os.environ.get("NIGHTJAR_TEST_MODEL", "")


@pytest.mark.timing
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not Path(MODEL, "config.json").is_file(),
    reason="set NIGHTJAR_TEST_MODEL to a SmolLM2 model folder",
)
def test_rows_of_mixed_lengths_are_done_sooner_than_in_static_batches_on_the_cpu():
    found = compare(MODEL, num_rows=16, max_num_seqs=8, repeat=1)
    assert found["is_same"]
    assert found["speedup"] >= 1, found
