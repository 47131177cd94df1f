"""The room's public names, and what importing it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import inference

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", inference.__all__)
def test_every_public_name_is_there(name):
    assert getattr(inference, name).__name__ == name


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="LLMM"):
        _ = inference.LLMM


@pytest.mark.parametrize(
    "module",
    ["inference", "inference.weights", "inference.detokenise", "inference.end_tokens",
     "inference.backends", "inference.backends.dummy", "inference.llm", "inference.gguf",
     "inference.tiers"],
)  # fmt: skip
def test_light_modules_leave_torch_alone(module):
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
