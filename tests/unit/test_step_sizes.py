"""How small the steps of a model may become when its load is spread evenly."""

from types import SimpleNamespace
from typing import Any

from inference.build_engine import _min_step_tokens


def model_with(**config: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(**config))


def test_steps_of_experts_are_large_enough_for_each_to_see_64_tokens():
    assert _min_step_tokens(model_with()) == 256
    assert _min_step_tokens(model_with(num_experts=128, num_experts_per_tok=8)) == 1024
    assert _min_step_tokens(model_with(num_experts=4, num_experts_per_tok=2)) == 256
