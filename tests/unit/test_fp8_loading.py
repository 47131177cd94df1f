"""Weights that are to be quantised to fp8 are read to the device, or to host memory when the device is too small."""

from pathlib import Path

import pytest
import torch

from inference.backends import paged
from inference.config import EngineConfig
from inference.errors import EngineConfigError
from inference.tensor_parallel import TensorParallel
from inference.weights import check_small_files

MODEL = Path(__file__).parents[1] / "data" / "models" / "tiny-a"
DEVICE = torch.device("cuda", 0)


def place(monkeypatch: pytest.MonkeyPatch, *, device_bytes: int, host_bytes: int) -> torch.device:
    monkeypatch.setattr(paged, "free_device_bytes", lambda device: device_bytes)
    monkeypatch.setattr(paged, "free_host_bytes", lambda: host_bytes)
    config = EngineConfig(model=str(MODEL), quantization="fp8")
    ranks = TensorParallel.alone()
    return paged._loading_device(check_small_files(MODEL), config, ranks, DEVICE)


def test_a_device_that_holds_the_full_weights_takes_them(monkeypatch):
    assert place(monkeypatch, device_bytes=10**9, host_bytes=0) == DEVICE


def test_else_they_wait_in_host_memory(monkeypatch):
    found = place(monkeypatch, device_bytes=100_000, host_bytes=10**9)
    assert found == torch.device("cpu")


def test_where_neither_holds_them_the_message_has_the_numbers(monkeypatch):
    with pytest.raises(EngineConfigError, match=r"0\.0 GB of weights in float32 are read before"):
        place(monkeypatch, device_bytes=100_000, host_bytes=100_000)
