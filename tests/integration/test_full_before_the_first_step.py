"""A device that is full while the engine is built: it is built smaller, says so, and gives the same tokens."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from inference import engine_sizes, memory, quantised_loading
from inference.arriving import Arriving
from inference.backends import paged
from inference.build_engine import build_engine
from inference.config import EngineConfig
from inference.errors import OutOfMemory
from inference.kv_cache import KVCache
from inference.model import FusedModel
from inference.model_runner import ModelRunner
from inference.tensor_parallel import TensorParallel
from inference.weights import check_small_files
from tests.paged_cases import (
    make_row,
    model_of,
    prompts_of,
    reference,
    run,
    sequences_of,
    settings_of,
    tokens,
)
from tests.tiny_models import MODELS

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB.\nAdvice over several lines."


def full_in_measuring(monkeypatch: Any, is_full: Callable[[Any, int], bool]) -> None:
    plan_memory = engine_sizes._plan_memory

    def plan(model: Any, settings: Any, *others: Any) -> Any:
        if is_full(settings, 0):
            raise torch.OutOfMemoryError(FULL)
        return plan_memory(model, settings, *others)

    monkeypatch.setattr(engine_sizes, "_plan_memory", plan)


def full_in_warm_up(
    monkeypatch: Any, is_full: Callable[[Any, int], bool], error: type[Exception]
) -> None:
    def warm_up(runner: Any, *args: Any, **kwargs: Any) -> None:
        if is_full(runner._limits, runner._model._cache.num_blocks):
            raise error(FULL)

    monkeypatch.setattr(ModelRunner, "warm_up", warm_up)


def engine_after(family: str = "qwen3", **settings: Any) -> Any:
    """Run some rows; they have the plain model's tokens. Return the engine."""
    sequences = sequences_of(prompts_of(10))
    expected = reference(model_of(family), sequences)
    completions, engine = run(FusedModel(model_of(family)), sequences, settings_of(**settings))
    assert tokens(completions) == expected
    return engine


def test_a_step_that_cannot_be_measured_is_made_smaller(monkeypatch, caplog):
    full_in_measuring(monkeypatch, lambda settings, _: settings.max_num_batched_tokens > 20)
    engine = engine_after()
    assert engine.scheduler.max_num_batched_tokens == 16
    assert "at most 32 tokens a step instead of 64" in caplog.text
    assert "at most 16 tokens a step instead of 32" in caplog.text
    assert "Advice" not in caplog.text


def test_where_fewer_tokens_do_not_do_fewer_sequences_are_run(monkeypatch, caplog):
    full_in_measuring(monkeypatch, lambda settings, _: settings.max_num_seqs > 2)
    engine = engine_after()
    assert engine.scheduler.max_num_seqs == 2
    assert "of 2 sequences instead of 4" in caplog.text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_warm_up_that_fills_the_device_leaves_the_cache_fewer_blocks(monkeypatch, caplog, error):
    full_in_warm_up(monkeypatch, lambda _, num_blocks: num_blocks > 150, error)
    with caplog.at_level(logging.WARNING):
        engine = engine_after()
    assert 26 < engine.scheduler.blocks.num_blocks <= 150
    assert "KV cache of 175 blocks instead of 201" in caplog.text
    assert engine.scheduler.max_num_batched_tokens == 64


def test_where_the_cache_must_hold_a_row_the_steps_are_made_smaller(monkeypatch):
    full_in_warm_up(
        monkeypatch, lambda limits, _: limits.max_num_tokens > 8, torch.OutOfMemoryError
    )
    engine = engine_after()
    assert engine.scheduler.max_num_batched_tokens == 8
    assert engine.scheduler.blocks.num_blocks >= 26


def test_a_device_that_is_full_in_any_warm_up_is_an_error_with_the_numbers(monkeypatch):
    full_in_warm_up(monkeypatch, lambda *_: True, torch.OutOfMemoryError)
    with pytest.raises(OutOfMemory, match=r"steps of 1 tokens; lower engine\.max_model_len, 100"):
        engine_after()


def test_a_device_without_memory_for_any_step_is_an_error_with_the_numbers(monkeypatch):
    full_in_measuring(monkeypatch, lambda *_: True)
    with pytest.raises(OutOfMemory, match=r"GB of weights; lower engine\.max_model_len, 100"):
        engine_after()


def test_a_cache_that_does_not_fit_is_made_smaller_and_the_plan_says_how_large_it_is(monkeypatch):
    def make(shape: Any, num_blocks: int, device: Any) -> KVCache:
        if num_blocks > 180:
            raise torch.OutOfMemoryError(FULL)
        return KVCache(shape, num_blocks, device)

    monkeypatch.setattr(memory, "KVCache", make)
    engine, plan, _ = build_engine(FusedModel(model_of("qwen3")), settings_of(), make_row)
    assert plan.num_blocks == engine.scheduler.blocks.num_blocks <= 180
    assert plan.kv_cache == plan.num_blocks * engine.runner._model._cache.shape.block_bytes


def test_an_error_that_is_not_of_memory_is_not_taken_for_it(monkeypatch):
    def warm_up(runner: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(ModelRunner, "warm_up", warm_up)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine_after()


@pytest.mark.parametrize(
    ("where", "quantization", "kind"),
    [(paged, "none", "float32"), (quantised_loading, "fp8", "fp8")],
)
def test_weights_that_fill_the_device_are_an_error_with_the_numbers(
    monkeypatch, where, quantization, kind
):
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(where, "take_layer" if kind == "fp8" else "make_paged_model", full)
    config = EngineConfig(model=str(MODELS / "tiny-a"), dtype="float32", quantization=quantization)
    files, ranks = Arriving.whole(MODELS / "tiny-a"), TensorParallel.alone()
    folder, device = check_small_files(files.folder()), torch.device("cpu")
    with pytest.raises(OutOfMemory, match=rf"loaded: 0\.0 GB of weights in {kind} on each of 1"):
        paged._load_model(files, folder, config, ranks, device)


def test_a_backend_says_how_many_sequences_it_runs_after_all(monkeypatch):
    full_in_measuring(monkeypatch, lambda settings, _: settings.max_num_seqs > 2)
    config = EngineConfig(
        model=str(MODELS / "tiny-a"), backend="paged", max_num_seqs=8, max_num_batched_tokens=16
    )
    backend = paged.PagedBackend(config)
    assert backend.info.max_num_seqs == 2
    backend.close()
