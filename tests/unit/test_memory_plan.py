"""How many KV blocks a device holds: what is left of it by weights, steps, graphs and what is to be spared."""

import pytest
import torch

from inference import memory
from inference.errors import EngineConfigError
from inference.kv_cache import KVShape
from inference.memory import MIB, MemoryPlan, plan_cuda

SHAPE = KVShape(num_layers=4, num_kv_heads=8, head_dim=128, block_size=64, dtype=torch.bfloat16)


@pytest.fixture
def device(monkeypatch) -> torch.device:
    """A device with 4,000 MiB free."""
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: 4000 * MIB)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    return torch.device("cuda", 0)


def plan(device: torch.device, **changes: int | bool) -> MemoryPlan:
    values = {"step_bytes": 100 * MIB, "max_blocks": 2**30}
    is_plain = {"has_peers": False, "expert_layer_bytes": 0}
    return plan_cuda(SHAPE, device=device, **{**values, **is_plain, **changes})


def test_the_cache_gets_what_is_left(device):
    found = plan(device)
    assert found.kv_cache == found.num_blocks * SHAPE.block_bytes
    assert found.step + found.graphs + found.kv_cache <= 4000 * MIB
    assert found.step + found.graphs + found.kv_cache + SHAPE.block_bytes > 4000 * MIB


@pytest.mark.parametrize(
    ("changes", "less"),
    [
        ({"spare_bytes": 320 * MIB}, 320),
        ({"step_bytes": 260 * MIB}, 320),
        ({"has_peers": True}, 4 * 32),
        ({"expert_layer_bytes": 16 * MIB}, 4 * 16),
        ({"tally_bytes": 320 * MIB}, 320),
    ],
)
def test_what_is_kept_for_something_else_is_not_the_caches(device, changes, less):
    fewer = plan(device).num_blocks - plan(device, **changes).num_blocks
    assert fewer == less * MIB // SHAPE.block_bytes


def test_no_room_is_refused_with_the_numbers(device):
    with pytest.raises(EngineConfigError, match=r"a step 2\.0 GB twice, 4\.2 GB free"):
        plan(device, step_bytes=1900 * MIB)
