"""How small steps may become, and which sizes are captured at the start."""

from types import SimpleNamespace
from typing import Any

import torch

from inference.build_engine import PagedSettings, _min_step_tokens, _warm_sizes


def model_with(**config: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(**config))


def settings_with(**changes: Any) -> PagedSettings:
    values: dict[str, Any] = {
        "max_model_len": 4096,
        "max_num_seqs": 1024,
        "max_num_batched_tokens": 8192,
        "block_size": 64,
        "min_step_tokens": 256,
        "kv_dtype": torch.bfloat16,
    }
    return PagedSettings(**{**values, **changes})


def test_experts_that_see_a_sixteenth_of_the_tokens_want_steps_sixteen_times_as_large():
    assert _min_step_tokens(model_with()) == 256
    assert _min_step_tokens(model_with(num_experts=128, num_experts_per_tok=8)) == 4096


def test_sizes_up_to_2048_are_captured_at_the_start_and_the_usual_one():
    assert max(_warm_sizes(settings_with())) == 2048
    assert _warm_sizes(settings_with(min_step_tokens=4096))[-2:] == [2048, 4096]
    few = settings_with(min_step_tokens=4096, max_num_batched_tokens=1024)
    assert max(_warm_sizes(few)) == 1024
    assert max(_warm_sizes(settings_with(min_step_tokens=None))) == 2048
