"""A start on an empty kernel cache: what is compiled beside the loading is all that the engine asks for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tiny_models import EXPERTS, SIZES, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        len(os.sched_getaffinity(0)) < 3, reason="needs processors that loading does not use"
    ),
]
PROGRAM = """
import json, sys, triton
from inference import LLM, SamplingParams

was_there = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: was_there.append(cache_hit)
plain = {"max_tokens": 4, "ignore_eos": True}
with LLM(sys.argv[1], max_model_len=64) as llm:
    for drawn in ({}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 5}):
        completion, *_ = llm.generate([[5, 6, 7]] * 3, SamplingParams(**plain, **drawn))
        assert len(completion.token_ids) == 4
print(json.dumps({"found": was_there.count(True), "compiled": was_there.count(False)}))
"""


@pytest.mark.parametrize(
    "config",
    [transformers.LlamaConfig(**SIZES), transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)],
    ids=["dense", "experts"],
)
def test_the_engine_compiles_nothing_that_was_not_compiled_ahead(
    config: Any, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", config)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model)],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        },
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["compiled"] == 0
    assert found["found"] >= 12
