"""The number format that a machine computes in, where the job leaves it open."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from inference import LLM, SamplingParams
from inference.config import EngineConfig
from inference.device_dtype import with_dtype_of_device
from tests.pipeline import MODELS


@pytest.fixture
def stored(tmp_path):
    def build(dtype: str) -> str:
        folder = shutil.copytree(MODELS / "tiny-a", tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        return str(folder)

    return build


@pytest.fixture
def plain_cpu(monkeypatch):
    """A CPU whose bfloat16 and float16 products are scalar loops."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)


@pytest.mark.parametrize(
    ("capability", "asked", "kept", "dtype"),
    [
        ((7, 5), "auto", "bfloat16", "float16"),
        ((7, 5), "bfloat16", "float32", "float16"),
        ((7, 5), "auto", "float32", "auto"),
        ((7, 5), "float32", "bfloat16", "float32"),
        ((8, 0), "auto", "bfloat16", "auto"),
    ],
)
def test_a_gpu_without_bfloat16_runs_in_float16(
    capability, asked, kept, dtype, monkeypatch, stored
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert with_dtype_of_device(EngineConfig(model=stored(kept), dtype=asked)).dtype == dtype


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize(
    ("asked", "kept", "dtype"),
    [
        ("auto", "bfloat16", "float32"),
        ("auto", "float16", "float32"),
        ("auto", "float32", "auto"),
        ("bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_a_cpu_without_16_bit_instructions_runs_in_float32(asked, kept, dtype, stored):
    assert with_dtype_of_device(EngineConfig(model=stored(kept), dtype=asked)).dtype == dtype


@pytest.mark.usefixtures("plain_cpu")
def test_a_model_too_large_in_float32_keeps_its_format_on_any_cpu(stored):
    folder = stored("bfloat16")
    config = json.loads(Path(folder, "config.json").read_text()) | {"num_hidden_layers": 10**9}
    Path(folder, "config.json").write_text(json.dumps(config))
    assert with_dtype_of_device(EngineConfig(model=folder)).dtype == "auto"


@pytest.mark.usefixtures("plain_cpu")
def test_quantised_weights_keep_their_format_on_any_cpu(stored):
    config = EngineConfig(model=stored("bfloat16"), quantization="int8")
    assert with_dtype_of_device(config).dtype == "auto"


def test_a_cpu_with_bfloat16_keeps_it(monkeypatch, stored):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert with_dtype_of_device(EngineConfig(model=stored("bfloat16"))).dtype == "auto"


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("backend", ["transformers", "paged"])
def test_both_backends_say_which_format_they_took(backend, stored):
    with LLM(stored("bfloat16"), backend=backend) as llm:
        (completion,) = llm.generate(["the cat"], SamplingParams(max_tokens=3, temperature=0.0))
        assert completion.finish_reason in ("stop", "length")
        assert llm.backend.info.dtype == "float32"
