"""A canary stops a bad run early, keeps its evidence, and its good answers are not made twice."""

import dataclasses
import json
from array import array

import pyarrow.parquet as pq
import pytest

from inference.backends import dummy
from inference.backends.dummy import DummyBackend
from inference.sampling import SamplingParams
from tasks.canary import CanaryResult, choose_rows, verdict
from tasks.feed import PreparedRow
from tasks.history import PastRun
from tasks.job_machine import CanaryConfig
from tests.pipeline import Nightjar

GOOD = CanaryResult(
    num_rows=64,
    num_sequences=64,
    num_completion_tokens=6400,
    error_rate=0.0,
    truncated_rate=0.1,
    repetitive_rate=0.0,
    completion_tokens_per_s=100.0,
    seconds=64.0,
    row_indices=[],
)
LAST = PastRun(
    run_id="r",
    published_at="",
    backend="dummy",
    device="none",
    num_replicas=1,
    num_rows=100,
    num_prompt_tokens=1,
    num_completion_tokens=10_000,
    completion_tokens_histogram={},
    replica_seconds={},
    rows_by_state={"ok": 95, "truncated": 5},
)


@pytest.fixture
def nightjar(tmp_path, capsys):
    return Nightjar(tmp_path, capsys)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [
        json.dumps({"text": f"row {n} " * (1 + n % 7) if n % 50 else None}) for n in range(300)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(**changes):
    return {
        "input__prompt": "{text}",
        "engine__backend": "dummy",
        "shards__max_rows": 50,
        "sampling__max_tokens": 64,
        "sampling__temperature": 0.8,
        **changes,
    }


def results(run):
    table = pq.read_table(run / "completions").to_pylist()
    return [{k: v for k, v in row.items() if k != "attempt"} for row in table]


def test_the_answers_of_a_canary_are_kept_and_are_the_ones_the_run_would_give(
    nightjar, rows, tmp_path
):
    plain = nightjar.run("tiny-a", rows, **settings(canary__rows=0))
    sampled = nightjar.run(
        "tiny-a", rows, **settings(canary__rows=20, output__uri=str(tmp_path / "other"))
    )
    assert (plain.code, sampled.code) == (0, 0), sampled.err
    told = json.loads((sampled.run / "_canary.json").read_text())
    assert told["num_rows"] == 20
    assert len(told["row_indices"]) == 20
    assert results(plain.run) == results(sampled.run)
    prefilled = [
        sum(
            json.loads(path.read_text())["receipt"]["num_prefilled_tokens"]
            for path in (done.run / "commits").glob("*.json")
        )
        for done in (plain, sampled)
    ]
    assert prefilled[1] < prefilled[0], "the canary's rows were not run again"
    first = min((sampled.run / "commits").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    seconds = json.loads(first.read_text())["receipt"]["seconds"]
    assert seconds["canary"] >= told["seconds"]
    assert seconds["load"] > 0, "the engine that the canary started is accounted for"
    assert "canary: 20 rows are well, " in sampled.err


def test_a_bad_sample_ends_the_run_with_the_evidence_and_nothing_else_started(nightjar, rows):
    stopped = nightjar.run(
        "tiny-a", rows, **settings(canary__rows=20, canary__max_truncated_rate=0.01)
    )
    assert stopped.code == 2
    assert "truncated_rate is" in stopped.err
    assert "canary.max_truncated_rate is 0.01" in stopped.err
    (run,) = (nightjar.folder / "out").glob("case-*")
    assert pq.read_table(run / "_canary.parquet").num_rows == 20
    assert not list(run.glob("commits/*"))
    before = (run / "_canary.json").read_bytes()
    again = nightjar.run("tiny-a", rows, **settings(canary__rows=20))
    assert again.code == 0, again.err
    assert (run / "_canary.json").read_bytes() == before, "a second look needs no engine"
    assert nightjar.call("verify", str(run)).code == 0


class Breaking(DummyBackend):
    """Ends in its third step, or while it is built, with an error that no engine announces."""

    when = "step"

    def __init__(self, config):
        if self.when == "build":
            raise ZeroDivisionError("of row 7's own words")
        super().__init__(config)

    def step(self):
        if self.stats.num_steps == 2:
            raise ZeroDivisionError("of row 7's own words")
        return super().step()


@pytest.mark.parametrize("when", ["build", "step"])
def test_an_engine_that_breaks_in_the_canary_is_one_line_and_the_next_start_goes_on(
    nightjar, rows, monkeypatch, when
):
    with monkeypatch.context() as broken:
        broken.setattr(dummy, "DummyBackend", Breaking)
        broken.setattr(Breaking, "when", when)
        stopped = nightjar.run("tiny-a", rows, **settings(canary__rows=20))
    assert stopped.code == 3, stopped.err
    assert "Traceback" not in stopped.err
    assert "own words" not in stopped.err
    (line,) = [line for line in stopped.err.splitlines() if line.startswith("nightjar run: ")]
    assert "canary of 20 rows: ZeroDivisionError at test_canary.py:" in line
    assert line.endswith("; run the same again, or go on with --set canary.rows=0")
    (run,) = (nightjar.folder / "out").glob("case-*")
    assert not [*run.glob("commits/*"), *run.glob("manifest*"), *run.glob("_canary*")]
    again = nightjar.run("tiny-a", rows, **settings(canary__rows=20))
    assert again.code == 0, again.err


def test_a_small_run_has_no_canary(nightjar, rows):
    done = nightjar.run("tiny-a", rows, **settings())
    assert done.code == 0
    assert not (done.run / "_canary.json").exists()


def prepared(index, tokens):
    return PreparedRow(
        index, array("i", tokens), SamplingParams(), index, len(tokens), None, None, False
    )


def test_a_sample_has_every_prefix_group_and_the_shortest_and_longest_of_each():
    common = [*range(100, 132)]
    rows = [prepared(n, [*common, *range(n)]) for n in range(50)]
    rows += [prepared(50 + n, [*range(200, 232), *range(3 * n)]) for n in range(10)]
    rows.append(prepared(60, [1, 2, 3]))
    chosen = choose_rows(rows, 12)
    assert len(chosen) == 12
    assert 60 in [row.row_index for row in chosen]
    lengths = [len(row.token_ids) for row in chosen if row.token_ids[0] == 100]
    assert (min(lengths), max(lengths)) == (32, 81)
    assert [row.row_index for row in choose_rows(rows, 12)] == [row.row_index for row in chosen]
    assert len(choose_rows(rows, 500)) == 61
    assert choose_rows([], 5) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"error_rate": 0.2}, "error_rate is 0.20, canary.max_error_rate is 0.10"),
        ({"truncated_rate": 0.4}, "truncated_rate is 0.40, the last good run had 0.05"),
        ({"repetitive_rate": 0.6}, "repetitive_rate is 0.60, canary.max_repetitive_rate is 0.50"),
        (
            {"num_completion_tokens": 640},
            "completions have 10 tokens on average, the last good run had 100",
        ),
        (
            {"num_completion_tokens": 64_000},
            "completions have 1000 tokens on average, the last good run had 100",
        ),
    ],
)
def test_rates_are_held_against_limits_and_the_last_good_run(changes, expected):
    assert verdict(dataclasses.replace(GOOD, **changes), CanaryConfig(), LAST) == expected


def test_a_canary_is_as_fast_as_the_last_one_on_such_a_device_if_the_job_says_so():
    config = CanaryConfig(max_slowdown=2.0)
    slow = dataclasses.replace(GOOD, completion_tokens_per_s=40.0, device="none")
    last = dataclasses.replace(LAST, canary_tokens_per_s=100.0)
    found = verdict(slow, config, last)
    assert found == "40.0 tokens/s, the canary of the last good run made 100.0"
    assert verdict(slow, CanaryConfig(), last) is None
    assert verdict(dataclasses.replace(slow, device="cpu"), config, last) is None
    assert verdict(slow, config, LAST) is None


def test_without_an_earlier_run_only_limits_count():
    long = dataclasses.replace(GOOD, num_completion_tokens=10**6, truncated_rate=1.0)
    assert verdict(long, CanaryConfig(), None) is None
    assert verdict(long, CanaryConfig(max_truncated_rate=0.5), None) is not None
