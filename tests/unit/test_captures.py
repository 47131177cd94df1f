"""Graphs are captured in warm-up, of what the run samples with, and none in the middle of it."""

import logging
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: kernels are not tested here")

from inference import LLM, model_runner
from inference.backends import paged
from inference.graphs import GraphPool
from inference.sampling import SamplingParams
from inference.sampling_needs import SamplingNeeds
from tests.paged_cases import (
    model_of,
    prompts_of,
    reference,
    run,
    sequences_of,
    settings_of,
    tokens,
)
from tests.plain_kernels import plain_model_sampled_by_kernels, plain_ops_taken_for_kernels

DRAWN = SamplingParams(max_tokens=4, temperature=0.9, ignore_eos=True)
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=4, ignore_eos=True),
    "drawn": DRAWN,
    "floors": SamplingParams(max_tokens=4, temperature=0.9, top_k=9, top_p=0.9),
    "penalties": SamplingParams(max_tokens=4, temperature=0.9, repetition_penalty=1.3),
    "bans": SamplingParams(max_tokens=4, min_tokens=2, ignore_eos=True),
}


class NotingPool(GraphPool):
    """Captures on any device, and notes what; a graph's replay is the launch it would take the place of."""

    def __init__(self, *, is_on: bool, has_collectives: bool = False) -> None:
        super().__init__(is_on=True, has_collectives=has_collectives)
        self.captured: list[Any] = []
        self.replay: Callable[[], None] = lambda: None

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        self.replay = launch
        super().run(key, launch)

    def _capture(self, key: Hashable, launch: Callable[[], None]) -> None:
        self.captured.append((self.is_warm, key))
        self._graphs[key] = self


@pytest.fixture(autouse=True)
def pool_on_any_device(monkeypatch: Any) -> None:
    monkeypatch.setattr(model_runner, "GraphPool", NotingPool)


def captured_late(sampling: SamplingParams, needs: SamplingNeeds) -> list[Any]:
    """Run rows of this sampling, with an engine that expects those needs; return what the run itself captured."""
    sequences = sequences_of(prompts_of(4), sampling)
    settings = settings_of(needs=needs)
    completions, engine = run(plain_model_sampled_by_kernels("qwen3"), sequences, settings)
    assert tokens(completions) == reference(model_of("qwen3"), sequences)
    return [key for is_late, key in engine.runner._graphs.captured if is_late]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_run_that_samples_as_its_job_says_captures_nothing_after_warm_up(name):
    sampling = SAMPLINGS[name]
    assert captured_late(sampling, SamplingNeeds.of(sampling)) == []


def test_a_row_that_asks_for_what_its_column_announced_captures_nothing():
    job = SamplingParams(max_tokens=4, ignore_eos=True)
    needs = SamplingNeeds.of(job, ("temperature", "top_p", "max_tokens"))
    assert captured_late(SAMPLINGS["greedy"], needs) == []
    assert needs == SamplingNeeds(draws=True, floors=True)


def test_what_nobody_announced_is_captured_with_a_line_in_the_log(caplog):
    with caplog.at_level(logging.INFO):
        late = captured_late(DRAWN, SamplingNeeds())
    assert late
    assert {key[0] for key in late} == {"head"}
    assert "in the middle of the run: ('head', 8, SamplingNeeds(draws=True" in caplog.text


def test_kinds_of_sampling_that_the_job_does_not_use_are_not_captured():
    sequences = sequences_of(prompts_of(3), DRAWN)
    settings = settings_of(needs=SamplingNeeds.of(DRAWN))
    _, engine = run(plain_model_sampled_by_kernels("qwen3"), sequences, settings)
    kinds = {key[2] for _, key in engine.runner._graphs.captured if key[0] == "head"}
    assert kinds == {SamplingNeeds(draws=True)}


def test_steps_that_only_decode_are_captured_for_as_many_tokens_as_there_are_sequences():
    sequences = sequences_of(prompts_of(3))
    _, engine = run(plain_model_sampled_by_kernels("qwen3"), sequences, settings_of())
    bodies = {key[1:] for _, key in engine.runner._graphs.captured if key[0] == "body"}
    assert {size for size, is_mixed in bodies if not is_mixed} == {8}
    assert {size for size, is_mixed in bodies if is_mixed} == {8, 16, 32, 64}


@pytest.fixture
def llm(monkeypatch: Any) -> Iterator[LLM]:
    monkeypatch.setattr(paged, "_ops", plain_ops_taken_for_kernels)
    model = Path(__file__).parents[1] / "data" / "models" / "tiny-a"
    with LLM(model, backend="paged", max_num_seqs=32, max_num_batched_tokens=4096) as llm:
        yield llm


def captures_of(llm: LLM) -> list[Any]:
    backend = llm.backend
    assert isinstance(backend, paged.PagedBackend)
    return backend._running_engine().runner._graphs.captured


def test_a_notebook_s_call_has_its_graphs_captured_before_its_first_step(llm):
    mixed = [SAMPLINGS["greedy"], SAMPLINGS["floors"], SAMPLINGS["penalties"]]
    num_before = len(captures_of(llm))
    answers = llm.generate([[9, 8, 7]] * 3, mixed)
    added = captures_of(llm)[num_before:]
    wanted = SamplingNeeds(draws=True, floors=True, penalties=True)
    assert added == [(False, ("head", 8, wanted))]
    assert llm.generate([[9, 8, 7]] * 3, mixed) == answers
    assert captures_of(llm)[num_before:] == added


def test_a_notebook_s_steps_of_many_prompt_tokens_are_captured_before_the_first(llm):
    prompts = [[1 + i] * 99 for i in range(31)]
    llm.generate(prompts, SamplingParams(max_tokens=1))
    sizes = {(is_late, key[1]) for is_late, key in captures_of(llm) if key[1] > 2048}
    assert sizes == {(False, 2816), (False, 3072)}
