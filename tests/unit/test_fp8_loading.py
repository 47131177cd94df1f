"""A model that is to be quantised to fp8 needs room for what it becomes and for a few layers, or is refused before."""

from pathlib import Path

import pytest
import torch

from inference import linears, quantised_loading
from inference.config import EngineConfig
from inference.errors import EngineConfigError, InferenceError, OutOfMemory
from inference.kernels.plain import FP8_MAX
from inference.model_config import read_model_shape
from inference.tensor_parallel import TensorParallel
from inference.weights import check_small_files

MODEL = Path(__file__).parents[1] / "data" / "models" / "tiny-a"
NEEDED = read_model_shape(MODEL).loading_bytes_per_rank(1, quantization="fp8")


def check(monkeypatch: pytest.MonkeyPatch, *, free: int, allowed: int) -> None:
    monkeypatch.setattr(quantised_loading, "free_device_bytes", lambda device: free)
    monkeypatch.setattr(quantised_loading, "allowed_device_bytes", lambda device: allowed)
    config = EngineConfig(model=str(MODEL), quantization="fp8")
    device = torch.device("cuda", 0)
    quantised_loading.check_room(check_small_files(MODEL), config, TensorParallel.alone(), device)


def test_a_device_that_holds_what_weights_become_and_a_few_layers_takes_them(monkeypatch):
    check(monkeypatch, free=NEEDED, allowed=10**9)


@pytest.mark.parametrize(
    ("allowed", "error", "remedy"),
    [
        (NEEDED - 1, EngineConfigError, r"the device has 0\.0 GB; use more ranks or a larger"),
        (10**9, OutOfMemory, r"the device has 0\.0 of 1\.0 GB free; free it of other processes"),
    ],
)
def test_one_that_does_not_is_refused_with_the_numbers(
    monkeypatch, allowed: int, error: type[InferenceError], remedy: str
):
    words = r"0\.0 GB of weights on each of 1 ranks, and 0\.0 GB of layers in float32 while.*; "
    with pytest.raises(error, match=words + remedy):
        check(monkeypatch, free=NEEDED - 1, allowed=allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_quantised_some_rows_at_a_time_is_the_one_quantised_at_once(monkeypatch, dtype):
    weight = torch.randn(37, 48, dtype=dtype)
    weight[5] = 0
    monkeypatch.setattr(linears, "_ELEMENTS_AT_ONCE", 5 * 48 + 1)
    found = linears.quantised(weight)
    scale = (weight.abs().amax(dim=1, keepdim=True).float() / FP8_MAX).clamp(min=1e-12)
    expected = (weight.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    assert torch.equal(found._scale, scale.t())
    assert torch.equal(found._weight.view(torch.uint8), expected.view(torch.uint8))
