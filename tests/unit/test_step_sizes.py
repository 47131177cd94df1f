"""How small the steps of a model may become when its load is spread evenly, and how large where memory is scarce."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inference import engine_sizes
from inference.config import EngineConfig
from inference.memory import MemoryPlan, NoRoom
from inference.paged_settings import PagedSettings, _min_step_tokens
from tests.paged_cases import settings_of


def model_with(**config: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(**config))


def test_steps_of_experts_are_large_enough_for_each_to_see_64_tokens():
    assert _min_step_tokens(model_with()) == 256
    assert _min_step_tokens(model_with(num_experts=128, num_experts_per_tok=8)) == 1024
    assert _min_step_tokens(model_with(num_experts=4, num_experts_per_tok=2)) == 256


GB = 10**9


def planned_steps(monkeypatch: Any, cache_gb: float, *, others_agree: bool = True) -> list[int]:
    """Tokens of the steps that memory is planned for, one plan after the other; 8,192 need 2 GB beside the cache."""
    tried: list[int] = []

    def plan(model: Any, settings: Any, limits: Any, scratch: Any) -> MemoryPlan:
        tried.append(settings.max_num_batched_tokens)
        step = 2 * GB * settings.max_num_batched_tokens // 8192
        left = int((cache_gb + 2) * GB) - step
        if left < 0:
            raise NoRoom("no room for a KV cache")
        return MemoryPlan(
            weights=0, step=step, graphs=0, tally=0, kv_cache=left, num_blocks=left // 10**6
        )

    monkeypatch.setattr(engine_sizes, "_plan_memory", plan)
    monkeypatch.setattr(engine_sizes, "batch_limits", lambda model, settings: None)
    settings = settings_of(max_num_batched_tokens=8192, fewer_batched_tokens=2048)
    ranks = SimpleNamespace(size=1, agree_on_least=lambda value: value if others_agree else 0)
    model = SimpleNamespace(uses_kernels=False, ranks=ranks, detach=lambda: None)
    found = engine_sizes.plan_sizes(model, settings)
    assert found.settings.max_num_batched_tokens == tried[-1]
    return tried


@pytest.mark.parametrize(
    ("cache_gb", "tried"),
    [
        (64, [8192]),
        (8, [8192, 2048]),
        (-1, [8192, 2048]),
        (-1.9, [8192, 2048, 1024, 512, 256]),
    ],
)
def test_steps_are_made_smaller_where_keys_and_values_would_miss_their_memory(
    cache_gb, tried, monkeypatch
):
    assert planned_steps(monkeypatch, cache_gb) == tried


def test_all_ranks_make_their_steps_smaller_if_one_has_to(monkeypatch):
    assert planned_steps(monkeypatch, 64, others_agree=False) == [8192, 2048]


def test_no_room_even_with_the_smallest_steps_is_refused(monkeypatch):
    with pytest.raises(NoRoom, match="no room"):
        planned_steps(monkeypatch, -2.1)


@pytest.mark.parametrize(("asked", "fewer"), [("auto", 2048), (8192, None)])
def test_steps_that_were_asked_for_stay_as_they_are(asked, fewer):
    config = EngineConfig(model="a", max_num_batched_tokens=asked)
    model = SimpleNamespace(
        device=torch.device("meta"), dtype=torch.bfloat16, can_be_captured=True, has_windows=False,
        config=SimpleNamespace(max_position_embeddings=4096),
    )  # fmt: skip
    assert PagedSettings.of(config, model).fewer_batched_tokens == fewer
