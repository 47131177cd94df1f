"""Receipts account for the time, and a second run is forecast from the first."""

import json
import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flows.config import load_job
from inference.backends.dummy import DummyBackend
from tasks.drain import drain, new_invocation
from tasks.finish import finish
from tasks.preflight import preflight
from tasks.progress import Progress
from tasks.run import prepare
from tasks.stop import StopSignal


def make_job(folder, num_rows=160, **changes):
    lines = [json.dumps({"text": f"row {n} " * (1 + n % 5)}) for n in range(num_rows)]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "name": "timed",
        "model": {"source": "dummy"},
        "input": {"uri": str(folder / "in.jsonl"), "prompt": "{text}"},
        "output": {"uri": str(folder / "out")},
        "sampling": {"max_tokens": 48},
        "engine": {"backend": "dummy", "max_num_seqs": 16},
        "hardware": {"price_per_hour": 3.6},
        "shards": {"max_rows": 40},
    }
    return load_job({**values, **changes})


def run_job(job, folder, step_s=0.004):
    folder.mkdir(exist_ok=True)
    run = prepare(job, work_dir=folder, progress=Progress())
    drained = time.monotonic()
    drain(
        run,
        invocation=new_invocation(),
        progress=Progress(),
        should_stop=StopSignal(),
        build_backend=lambda config: DummyBackend(config, step_s=step_s),
    )
    wall = time.monotonic() - drained
    return run, wall, finish(run.store, Progress())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    job = make_job(folder)
    run, wall, manifest = run_job(job, folder / "work", step_s=0.01)
    return folder, job, run, wall, manifest


def test_the_phases_of_every_shard_add_up_to_its_wall_time(first):
    _, _, run, _, _ = first
    for commit in run.commits().values():
        receipt = commit.receipt
        assert sum(receipt["seconds"].values()) == pytest.approx(receipt["wall_s"], rel=0.02)


@pytest.mark.timing
def test_the_shards_of_a_replica_add_up_to_the_time_it_took(first):
    _, _, run, wall, manifest = first
    told = sum(commit.receipt["wall_s"] for commit in run.commits().values())
    # The feed starts before the first claim and the last commit ends after the last receipt.
    assert told == pytest.approx(wall, abs=max(0.4, 0.02 * wall))
    assert sum(manifest.totals["replica_seconds"].values()) == pytest.approx(told, rel=0.02)
    assert manifest.totals["usd"] == pytest.approx(told * 3.6 / 3600, rel=0.01)


def test_a_receipt_says_what_it_knows_and_null_where_it_knows_nothing(first):
    _, _, run, _, _ = first
    receipts = [commit.receipt for _, commit in sorted(run.commits().items())]
    lengths = [sum(r["completion_tokens_histogram"].values()) for r in receipts]
    assert lengths == [40, 40, 40, 40]
    assert receipts[0]["roofline"] == {
        "gpu": None,
        "prefill_share_of_flops": None,
        "decode_share_of_bandwidth": None,
    }
    assert "tokens/s over" in receipts[0]["summary"]
    assert receipts[-1]["seconds"]["tail"] > 0
    assert receipts[0]["seconds"]["decode"] > receipts[0]["seconds"]["tail"]
    assert receipts[0]["seconds"]["start"] > 0


def test_what_the_engine_reserves_is_in_every_receipt_and_once_in_the_log(tmp_path, caplog):
    source = str(Path(__file__).parents[1] / "data" / "models" / "tiny-a")
    job = make_job(
        tmp_path,
        num_rows=12,
        model={"source": source, "dtype": "float32"},
        engine={"backend": "paged", "max_num_seqs": 4, "max_model_len": 128},
        sampling={"max_tokens": 4},
        shards={"max_rows": 6},
    )
    run = prepare(job, work_dir=tmp_path, progress=Progress())
    with caplog.at_level(logging.INFO):
        drain(
            run,
            invocation=new_invocation(),
            progress=Progress(),
            should_stop=StopSignal(),
        )
    run.close()
    receipts = [commit.receipt for commit in run.commits().values()]
    assert len(receipts) == 2
    for receipt in receipts:
        reserved = receipt["reserved_device_bytes"]
        assert {"weights", "step", "graphs", "tally", "spare", "kv_cache"} == reserved.keys()
        assert all(type(count) is int for count in reserved.values())
        assert reserved["weights"] > 0
        assert reserved["kv_cache"] > 0
    assert caplog.text.count("reserved on each device: weights 0.00 GB") == 1


def test_the_second_run_of_a_job_is_forecast_from_the_first(first, tmp_path):
    folder, *_ = first
    again = make_job(folder, num_rows=320, name="again")
    found = preflight(again, work_dir=tmp_path / "plan", now=lambda: datetime.now(UTC))
    told = found.forecast
    assert (told.lengths.basis, told.speed_basis) == ("history", "history")
    second, _, _ = run_job(again, tmp_path / "work", step_s=0.01)
    receipts = [commit.receipt for commit in second.commits().values()]
    tokens = sum(receipt["num_completion_tokens"] for receipt in receipts)
    assert told.num_completion_tokens_p50 == pytest.approx(tokens, rel=0.15)
    seconds = told.seconds_p50 - found.planning["seconds"]
    assert told.usd_p50 == pytest.approx(seconds * 3.6 / 3600, rel=0.15)


@pytest.mark.timing
def test_the_second_run_of_a_job_takes_what_was_forecast_from_the_first(first, tmp_path):
    folder, *_ = first
    # The forecast is of a machine as it was: when other work came or went meanwhile, the next run tells.
    for attempt in range(3):
        again = make_job(folder, num_rows=320, name=f"timed-{attempt}")
        found = preflight(
            again, work_dir=tmp_path / f"plan-{attempt}", now=lambda: datetime.now(UTC)
        )
        told = found.forecast
        second, _, _ = run_job(again, tmp_path / f"work-{attempt}", step_s=0.01)
        receipts = [commit.receipt for commit in second.commits().values()]
        took = sum(receipt["wall_s"] for receipt in receipts)
        expected = told.seconds_p50 - found.planning["seconds"]
        if abs(expected / took - 1) <= 0.15:
            break
    assert expected == pytest.approx(took, rel=0.15)
    assert told.seconds_p90 - found.planning["seconds"] >= took
    assert told.usd_p50 == pytest.approx(took * 3.6 / 3600, rel=0.15)


MODEL = os.environ.get("NIGHTJAR_TEST_MODEL", "")


@pytest.mark.timing
@pytest.mark.skipif(
    not Path(MODEL, "config.json").is_file(),
    reason="set NIGHTJAR_TEST_MODEL to a SmolLM2 model folder",
)
def test_a_real_model_is_forecast_from_its_first_run(tmp_path):
    changes = {
        "model": {"source": MODEL, "dtype": "float32"},
        "engine": {"backend": "transformers", "max_num_seqs": 16, "max_model_len": 256},
        "sampling": {"max_tokens": 24},
    }
    run_real(make_job(tmp_path, num_rows=48, **changes), tmp_path / "first")
    # As above: when the machine was not what it had been, the next run tells.
    for attempt in range(3):
        job = make_job(tmp_path, num_rows=72, name=f"timed-{attempt}", **changes)
        told = preflight(job, work_dir=tmp_path / f"plan-{attempt}")
        assert told.forecast.speed_basis == "history"
        took = run_real(job, tmp_path / f"work-{attempt}")
        forecast = told.forecast.seconds_p50 - told.planning["seconds"]
        print(json.dumps({"forecast_s": forecast, "took_s": took}))
        if abs(forecast / took - 1) <= 0.15:
            break
    assert forecast == pytest.approx(took, rel=0.15)
    assert told.forecast.seconds_p90 - told.planning["seconds"] >= took


def run_real(job, folder):
    """Run a job on the model it names; return the seconds in its receipts."""
    folder.mkdir()
    run = prepare(job, work_dir=folder, progress=Progress())
    drain(run, invocation=new_invocation(), progress=Progress(), should_stop=StopSignal())
    assert finish(run.store, Progress()) is not None
    run.close()
    return sum(commit.receipt["wall_s"] for commit in run.commits().values())
