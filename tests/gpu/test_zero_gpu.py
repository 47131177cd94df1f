"""ZeRO-Inference on a device: weights fetched from pinned host memory give the tokens of a model that is on it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from inference.backends import create_backend
from inference.config import EngineConfig
from inference.sampling import SamplingParams
from inference.sequence import Sequence
from tests.tiny_models import EXPERTS, SIZES, make_model

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = {
    "dense": lambda: transformers.Qwen3Config(**SIZES, initializer_range=0.2),
    "experts": lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, initializer_range=0.2),
}


def rows_of_many_lengths() -> list[Sequence]:
    return [
        Sequence(
            i,
            [3 + (7 * i + 11 * k) % 250 for k in range(1 + (17 * i) % 30)],
            SamplingParams(max_tokens=12, temperature=0.7 * (i % 2), ignore_eos=True),
            draw_seed=i,
        )
        for i in range(20)
    ]


def generate(
    model: Path, backend_name: str, rows: list[Sequence], dtype: Any = "float32"
) -> dict[int, tuple[int, ...]]:
    backend = create_backend(
        EngineConfig(model=str(model), backend=backend_name, dtype=dtype, max_num_seqs=8)
    )
    try:
        backend.submit(rows)
        found = {}
        while backend.num_unfinished:
            found.update({c.seq_id: c.token_ids for c in backend.step()})
        return found
    finally:
        backend.close()


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_in_host_memory_give_the_same_tokens(kind, tmp_path):
    model = make_model(tmp_path / "model", CONFIGS[kind]())
    expected = generate(model, "transformers", rows_of_many_lengths())
    found = generate(model, "zero", rows_of_many_lengths())
    # fp32 in batches of another shape: a draw may differ where two scores agree to the last places
    assert sum(found[i] == expected[i] for i in expected) >= 19


def test_long_prompts_in_bf16_give_the_same_tokens(tmp_path):
    shape = {**SIZES, "num_hidden_layers": 24, "head_dim": 64, "max_position_embeddings": 1024}
    model = make_model(tmp_path, transformers.Qwen3Config(**shape, initializer_range=0.1))
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    rows = [
        Sequence(i, [3 + (7 * i + 11 * k * k) % 250 for k in range(200)], sampling)
        for i in range(8)
    ]
    # One batch for both, so that every product has the same shape: then not a bit may differ.
    assert generate(model, "zero", rows, "bfloat16") == generate(
        model, "transformers", rows, "bfloat16"
    )
