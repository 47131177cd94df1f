"""nightjar bench: every completion has its length, whatever the weights; what is asked wrongly is refused."""

import json

import pytest

from flows.cli import main
from inference.backends.dummy import DummyBackend
from inference.config import EngineConfig
from inference.request_mixes import requests
from tasks.bench import bench
from tests.pipeline import MODELS


class Recorder(DummyBackend):
    """Remembers the prompts it was given."""

    def __init__(self) -> None:
        super().__init__(EngineConfig(model=""))
        self.prompts = []

    def submit(self, sequences):
        sequences = list(sequences)
        self.prompts += [sequence.prompt_token_ids for sequence in sequences]
        super().submit(sequences)


@pytest.fixture
def model() -> str:
    return str(MODELS / "tiny-a")


def test_a_mix_is_measured_with_its_lengths_and_the_engine_described(model, capsys):
    code = main(
        [
            "bench",
            model,
            "--to",
            "none",
            "--backend",
            "paged",
            "--mix",
            "chat:5",
            "--repeat",
            "2",
            "--json",
        ]
    )
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engine"]["backend"] == "paged"
    assert found["engine"]["memory"]["kv_cache"] > 0
    (mix,) = found["mixes"]
    assert (mix["mix"], mix["num_requests"], len(mix["all_seconds"])) == ("chat", 5, 2)
    assert 0 < mix["num_completion_tokens"] <= sum(length for _, length in requests("chat", 5))
    assert mix["completion_tokens_per_s"] == pytest.approx(
        mix["num_completion_tokens"] / mix["seconds"], rel=0.01
    )


def test_repeats_have_the_same_lengths_and_other_prompts():
    backend = Recorder()
    bench(backend, [("template", 4)], vocab_size=300, repeat=2)
    runs = backend.prompts[8:12], backend.prompts[12:16]
    assert [len(p) for p in runs[0]] == [len(p) for p in runs[1]]
    assert runs[0] != runs[1]
    assert max(max(p) for p in backend.prompts) < 300


def test_people_get_a_table(model, capsys):
    assert (
        main(["bench", model, "--to", "none", "--mix", "uniform:1", "--backend", "transformers"])
        == 0
    )
    out = capsys.readouterr().out
    assert "uniform:1" in out
    assert "completion tokens/s" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mix", "chatty:5"], "MIX:REQUESTS, MIX one of uniform, chat, template"),
        (["--mix", "chat:0"], "REQUESTS 1 or more"),
        (["--dtype", "float8"], "engine.dtype is 'float8': use auto, bfloat16"),
        (["--tensor-parallel-size", "0"], "engine.tensor_parallel_size must be at least 1, got 0"),
        (["--repeat", "0"], "--repeat is 0; give 1 or more"),
    ],
)
def test_what_is_asked_wrongly_is_refused_before_anything_is_loaded(
    model, capsys, options, message
):
    assert main(["bench", model, "--to", "none", *options]) == 2
    assert message in capsys.readouterr().err
