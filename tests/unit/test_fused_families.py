"""Which weights the paged engine runs on fused layers, by config.json alone."""

import pytest

from inference.families import is_fused

BF16 = {"model_type": "qwen3", "dtype": "bfloat16"}


def stored(**settings: object) -> dict[str, object]:
    return {**BF16, "quantization_config": {"quant_method": "bitsandbytes", **settings}}


@pytest.mark.parametrize(
    ("config", "quantization", "fused"),
    [
        (BF16, "none", True),
        (BF16, "fp8", True),
        (BF16, "nf4", True),
        (BF16, "int8", False),
        ({**BF16, "model_type": "qwen3_moe"}, "none", True),
        ({**BF16, "model_type": "qwen3_moe"}, "nf4", False),
        ({**BF16, "model_type": "gemma"}, "nf4", False),
        (stored(load_in_8bit=True), "none", False),
        (stored(load_in_4bit=True), "none", False),  # which computes in float32
        (stored(load_in_4bit=True, bnb_4bit_compute_dtype="float16"), "none", False),
        (stored(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16"), "none", True),
    ],
)
def test_weights_that_can_be_laid_side_by_side_run_on_fused_layers(config, quantization, fused):
    assert is_fused(config, quantization) is fused
