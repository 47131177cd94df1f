"""A budget refuses before, or stops cleanly; a run that stopped goes on."""

import json
import subprocess
import sys

import pytest

from flows.config import load_job
from inference.backends.dummy import DummyBackend
from tasks.budget import BudgetSpent
from tasks.drain import drain, new_invocation
from tasks.finish import finish
from tasks.progress import Progress
from tasks.run import prepare
from tasks.stop import StopSignal
from tests.pipeline import Nightjar


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(60)))
    return path


def drained(rows, folder, usd):
    values = {
        "model": {"source": "dummy"},
        "input": {"uri": str(rows), "prompt": "{text}"},
        "output": {"uri": str(folder / "out")},
        "sampling": {"max_tokens": 16},
        "engine": {"backend": "dummy", "max_num_seqs": 4},
        "shards": {"max_rows": 6},
        "hardware": {"price_per_hour": 36000.0},
        "budget": {"usd": usd},
    }
    run = prepare(load_job(values), work_dir=folder / "work", progress=Progress())
    drain(
        run,
        invocation=new_invocation(),
        progress=Progress(),
        should_stop=StopSignal(),
        build_backend=lambda config: DummyBackend(config, step_s=0.004),
    )
    return run


def test_a_run_stops_before_the_shard_that_would_not_fit_and_goes_on_with_more(rows, tmp_path):
    (tmp_path / "work").mkdir()
    with pytest.raises(BudgetSpent, match="raise the budget and run again to go on"):
        drained(rows, tmp_path, usd=1.0)
    run = prepare(
        load_job(
            {
                "model": {"source": "dummy"},
                "input": {"uri": str(rows), "prompt": "{text}"},
                "output": {"uri": str(tmp_path / "out")},
                "sampling": {"max_tokens": 16},
                "engine": {"backend": "dummy"},
            }
        ),
        work_dir=tmp_path / "work",
        progress=Progress(),
    )
    commits = run.commits()
    assert 0 < len(commits) < 10, "some shards are committed, none is half done"
    assert finish(run.store, Progress()) is None
    first = {shard_id: commit.nonce for shard_id, commit in commits.items()}
    run = drained(rows, tmp_path, usd=100_000.0)
    manifest = finish(run.store, Progress())
    assert manifest is not None
    assert manifest.num_rows == 60
    assert {i: run.commits()[i].nonce for i in first} == first, "nothing is done twice"


def test_the_command_says_partial_and_why(rows, tmp_path, capsys):
    nightjar = Nightjar(tmp_path, capsys)
    settings = {
        "input__prompt": "{text}",
        "engine__backend": "dummy",
        "shards__max_rows": 10,
        "hardware__price_per_hour": 3.6e6,
        "budget__usd": 0.5,
    }
    stopped = nightjar.run("tiny-a", rows, **settings)
    assert stopped.code == 3
    assert "budget.usd is 0.50" in stopped.err
    (run,) = (tmp_path / "out").glob("case-*")
    watching = [sys.executable, "-m", "flows.cli", "status", str(run), "--watch", "--every", "0.2"]
    with subprocess.Popen(
        watching, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watch:
        assert watch.stdout.readline().startswith("not published | ")
        watch.stdout.close()  # as `head -1` does
        assert watch.stderr.read() == ""
    assert watch.returncode == 3


def test_a_run_forecast_over_the_budget_is_refused_before_it_starts(rows, tmp_path, capsys):
    nightjar = Nightjar(tmp_path, capsys)
    settings = {
        "input__prompt": "{text}",
        "engine__backend": "dummy",
        "hardware__price_per_hour": 3.6e6,
    }
    assert nightjar.run("tiny-a", rows, **settings).code == 0
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"text": f"other {n}"}) + "\n" for n in range(60)))
    refused = nightjar.run("tiny-a", more, **settings, budget__usd=0.01)
    assert refused.code == 2
    assert "budget.usd is 0.01, the forecast is" in refused.err
    assert not list((tmp_path / "out").glob("*/commits/*.r2.json"))
