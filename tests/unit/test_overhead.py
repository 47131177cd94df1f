"""What is known must not be paid for by the engine: the benchmark of it, in short."""

from tests.benchmarks.bench_knowing import SCRAPE_EVERY_S, row_s, scrape_s, step_s

TOKENS_PER_S, NUM_RUNNING, MEAN_TOKENS = 30_000, 1024, 300


def test_bookkeeping_of_steps_rows_and_scrapes_takes_less_than_a_hundredth_of_a_core():
    share = step_s() * TOKENS_PER_S / NUM_RUNNING
    share += row_s(MEAN_TOKENS) * TOKENS_PER_S / MEAN_TOKENS
    share += scrape_s() / SCRAPE_EVERY_S
    assert share < 0.01
