"""The further hosts of a replica: what they are told, and the model they stage."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.config import load_job
from flows.provisioning import variables_of_replica
from inference.errors import ModelError
from tasks import follow
from tasks.progress import Progress
from tasks.provision import ReplicaLaunch
from tasks.run import prepare
from tests.pipeline import MODELS


@pytest.fixture
def plan(tmp_path):
    pq.write_table(pa.table({"prompt": ["one", "two"]}), tmp_path / "in.parquet")
    made = []

    def planned(model=MODELS / "tiny-a"):
        job = {
            "model": {"source": str(model)},
            "input": {
                "uri": str(tmp_path / "in.parquet"),
                "prompt_column": "prompt",
                "chat_template": "none",
            },
            "output": {"uri": str(tmp_path / "out")},
            "engine": {"backend": "paged", "max_model_len": 64},
            "hardware": {"provider": "kubernetes", "stage_to": str(tmp_path / "cache")},
            "storage": {"region": "eu-central-1"},
        }
        (tmp_path / "work").mkdir()
        made.append(prepare(load_job(job), work_dir=tmp_path / "work", progress=Progress()))
        return made[0]

    yield planned
    for run in made:
        run.close()


def test_replicas_over_several_hosts_are_told_of_their_run_and_others_are_not(plan):
    run = plan()
    two = ReplicaLaunch(deployment="d", job_variables={"num_hosts": 2, "env": {"A": "b"}})
    env = variables_of_replica(run, two, 0)["env"]
    assert env["A"] == "b"
    assert json.loads(env["NIGHTJAR_FOLLOW"]) == {
        "run_uri": run.uri,
        "endpoint_url": None,
        "region": "eu-central-1",
        "profile": None,
    }
    one = ReplicaLaunch(deployment="d", job_variables={"num_hosts": 1})
    assert variables_of_replica(run, one, 0) == {"num_hosts": 1}


def test_a_host_that_finds_another_model_joins_nothing_and_says_which(
    plan, tmp_path, monkeypatch, capsys
):
    model = shutil.copytree(MODELS / "tiny-a", tmp_path / "model")
    run = plan(model)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    monkeypatch.setattr(follow, "RankGroup", None)  # nothing may be started
    with pytest.raises(ModelError, match="this run was planned with"):
        follow.follow(run.record)
    monkeypatch.setenv(
        "NIGHTJAR_FOLLOW", variables_of_replica(run, TWO, 0)["env"]["NIGHTJAR_FOLLOW"]
    )
    monkeypatch.setattr(follow.signal, "signal", lambda *_: None)
    assert follow.main() == 2
    assert "this run was planned with" in capsys.readouterr().err


def test_a_host_that_is_told_of_no_run_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.delenv("NIGHTJAR_FOLLOW", raising=False)
    monkeypatch.setattr(follow.signal, "signal", lambda *_: None)
    assert follow.main() == 2
    assert "NIGHTJAR_FOLLOW is None: does not name a run" in capsys.readouterr().err


TWO = ReplicaLaunch(deployment="d", job_variables={"num_hosts": 2})
