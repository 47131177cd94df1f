"""How a job's settings and a pod's environment become the ranks of a replica."""

import dataclasses
from typing import Any

import pytest
import torch

from inference.backends import resolve_backend
from inference.config import DistributedConfig
from inference.errors import EngineConfigError
from tasks.job import InputConfig, ModelConfig, OutputConfig, RunConfig
from tasks.job_machine import EngineKnobs
from tasks.model import open_model
from tasks.progress import Progress
from tasks.ranks import distributed_of
from tests.processes import REPOSITORY


def job(**engine: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(source=str(REPOSITORY / "tests" / "data" / "models" / "tiny-a")),
        input=InputConfig(uri="prompts.parquet", prompt_column="prompt"),
        output=OutputConfig(uri="out"),
        engine=EngineKnobs(**engine),
    )


def test_a_pod_of_several_finds_the_first_one(monkeypatch):
    monkeypatch.setenv("NIGHTJAR_NUM_HOSTS", "2")
    monkeypatch.setenv("NIGHTJAR_LEADER", "run-0.nightjar-ranks")
    settings = distributed_of(job(distributed=DistributedConfig(interface="eth0")))
    assert settings == DistributedConfig(
        num_hosts=2, rendezvous="run-0.nightjar-ranks:29500", interface="eth0"
    )


def test_a_job_that_names_its_hosts_is_taken_at_its_word(monkeypatch):
    monkeypatch.setenv("NIGHTJAR_NUM_HOSTS", "2")
    monkeypatch.setenv("NIGHTJAR_LEADER", "run-0.nightjar-ranks")
    named = DistributedConfig(num_hosts=4, rendezvous="here:1")
    assert distributed_of(job(distributed=named)) == named


def test_one_pod_stays_alone(monkeypatch):
    monkeypatch.setenv("NIGHTJAR_NUM_HOSTS", "1")
    monkeypatch.setenv("NIGHTJAR_LEADER", "run-0.nightjar-ranks")
    assert distributed_of(job()) == DistributedConfig()


def test_a_replica_of_several_ranks_runs_on_the_backend_that_has_ranks():
    assert resolve_backend("auto", 2) == "paged"
    assert resolve_backend("auto", 1) == ("paged" if torch.cuda.is_available() else "transformers")
    assert resolve_backend("zero", 2) == "zero"


@pytest.mark.parametrize(
    ("engine", "quantization", "message"),
    [
        ({"tensor_parallel_size": 2, "backend": "transformers"}, "none", "runs in one process"),
        ({"tensor_parallel_size": 4, "backend": "paged"}, "none", "does not divide 2 KV heads"),
        ({"tensor_parallel_size": 4}, "none", "does not divide 2 KV heads"),
        ({"tensor_parallel_size": 2, "backend": "paged"}, "int8", "ranks cannot share weights"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_the_model(engine, quantization, message):
    wrong = job(**engine)
    model = dataclasses.replace(wrong.model, quantization=quantization)
    with pytest.raises(EngineConfigError, match=message):
        open_model(dataclasses.replace(wrong, model=model), progress=Progress())
