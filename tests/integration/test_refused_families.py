"""Models that the paged engine refuses are refused by their small files, before weights are there or looked for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from flows.config import load_job
from inference.backends import check_engine, paged
from inference.config import EngineConfig
from inference.errors import EngineConfigError
from inference.weights import check_small_files
from tasks.progress import Progress
from tasks.run import prepare
from tests.tiny_models import MODELS, SIZES, make_model

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
GPT = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "scaled": (transformers.Gemma2Config(**SIZES), {}, "gemma2 scales its logits .*; use transf"),
    "rope": (
        transformers.LlamaConfig(**SIZES, rope_parameters=DYNAMIC),
        {},
        "llama has rope_type dynamic, whose frequencies",
    ),
    "no attention interface": (
        transformers.BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4),
        {},
        "bloom does not use transformers' attention interface; use transformers",
    ),
    "later tokens": (
        transformers.Gemma3TextConfig(**SIZES, use_bidirectional_attention=True),
        {},
        "gemma3_text attends to later tokens",
    ),
    "attends twice a layer": (
        transformers.DiffLlamaConfig(**SIZES),
        {},
        "diffllama attends 6 times in 3 layers, not once in each in their order; use transf",
    ),
    "layers run over and over": (
        transformers.HrmTextConfig(**{**SIZES, "num_key_value_heads": 4}),
        {},
        r"hrm_text attends \d+ times in \d+ layers, not once in each",
    ),
    "heads of latent attention": (
        transformers.DeepseekV2Config(**SIZES, moe_intermediate_size=16, n_routed_experts=4),
        {},
        "deepseek_v2 attends with heads of other sizes than its config.json says",
    ),
    "a mask of its own": (
        transformers.DogeConfig(**SIZES),
        {},
        "attention makes a mask of its own",
    ),
    "a state beside attention": (
        transformers.FalconH1Config(**SIZES),
        {},
        "falcon_h1 keeps more of earlier tokens than keys and values",
    ),
    "no attention": (transformers.MambaConfig(), {}, "mamba has no attention heads"),
    "heads of several sizes": (
        transformers.Gemma4TextConfig(**SIZES),
        {},
        "gemma4_text has layers with heads of several sizes",
    ),
    "attention routed to experts": (
        transformers.JetMoeConfig(**SIZES),
        {},
        "jetmoe has attention heads that are experts",
    ),
    "fp8 of an unfused family": (
        transformers.GemmaConfig(**SIZES),
        {"quantization": "fp8"},
        "fp8: not available for model_type gemma; use none",
    ),
    "uncut": (
        transformers.GPTNeoXConfig(**GPT, intermediate_size=96),
        {"tensor_parallel_size": 2},
        "is 2: no rule of tensor parallel covers layers of model_type gpt_neox; use 1",
    ),
    "experts": (
        transformers.MixtralConfig(**SIZES, num_local_experts=4),
        {"tensor_parallel_size": 2},
        "is 2: experts of model_type mixtral cannot be partitioned yet",
    ),
}


def small_files(folder: Path, config: Any) -> Path:
    """Write what a folder holds before its weights come."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / "tiny-a" / name, folder / name)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_cannot_run_is_refused_by_small_files_alone(name, tmp_path):
    model_config, changes, words = REFUSED[name]
    folder = check_small_files(small_files(tmp_path / "model", model_config))
    config = EngineConfig(model=str(folder.path), backend="paged", **changes)
    with pytest.raises(EngineConfigError, match=words):
        check_engine(folder, config, is_here=False)


@pytest.mark.parametrize(
    "model_config",
    [
        transformers.Qwen3Config(**SIZES),
        transformers.GemmaConfig(**SIZES),
        transformers.GPTNeoXConfig(**GPT, intermediate_size=96),
        transformers.Gemma3TextConfig(**SIZES, sliding_window=12),
    ],
)
def test_what_it_can_run_is_not_refused(model_config, tmp_path):
    folder = check_small_files(small_files(tmp_path / "model", model_config))
    check_engine(folder, EngineConfig(model=str(folder.path), backend="paged"), is_here=False)


def test_a_backend_refuses_before_it_reads_weights(tmp_path, monkeypatch):
    def load(*args: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(paged, "_load", load)
    config, _, words = REFUSED["later tokens"]
    folder = make_model(tmp_path / "model", config)
    with pytest.raises(EngineConfigError, match=words):
        paged.PagedBackend(EngineConfig(model=str(folder), backend="paged"))


def test_a_run_is_refused_before_it_is_planned(tmp_path):
    folder = make_model(
        tmp_path / "model", transformers.LlamaConfig(**SIZES, rope_parameters=DYNAMIC)
    )
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    job = load_job(
        {
            "model": {"source": str(folder)},
            "input": {"uri": str(tmp_path / "in.jsonl"), "prompt": "{text}"},
            "output": {"uri": str(tmp_path / "out")},
            "engine": {"backend": "paged"},
        }
    )
    with pytest.raises(EngineConfigError, match="rope_type dynamic"):
        prepare(job, work_dir=tmp_path, progress=Progress())
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("plan.json"))
