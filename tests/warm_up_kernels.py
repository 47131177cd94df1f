"""What real models' warm-ups ask of Triton, beside what `inference.compile_ahead` foretells; no device is needed.

    python -m tests.warm_up_kernels

Prints one JSON line of what foretelling needed, one for every case (asked for and not foretold, and back), and one of
what a real model's warm-up compiled after `inference.precompile` was done. A process of its own: in the tests' process
Triton interprets kernels.
"""

import dataclasses
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton

from inference.absent_model import AbsentModel
from inference.build_engine import run_all
from inference.compile_ahead import noted_instead_of_compiled, variants
from inference.config import EngineConfig
from inference.kernels import fused, fused_attention
from inference.kernels.absent_card import AbsentCard, Utils
from inference.model import FusedModel, PagedModel, make_paged_model
from inference.paged_settings import PagedSettings
from inference.precompile import CardFacts, Precompile, is_done, task_for

FACTS = CardFacts(
    capability=90, num_multiprocessors=fused_attention.num_multiprocessors(torch.device("cpu"))
)
FP8: dict[str, Any] = {"quantization": "fp8", "kv_cache_dtype": "fp8"}
SIZES: dict[str, Any] = {"max_num_seqs": 24, "max_num_batched_tokens": 200}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("qwen3", {}, {}),
    "dense fp8": ("qwen3", {}, FP8),
    "biases, odd sizes": ("llama", {}, {"max_num_seqs": 13, "max_model_len": 64}),
    "tied, one block a row": ("qwen2", {"tie_word_embeddings": True}, {"dtype": "float16"}),
    "a window": ("mistral-window", {}, {}),
    "windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
        {},
    ),
    "experts": ("qwen3-moe", {}, {}),
    "experts fp8": ("qwen3-moe", {"norm_topk_prob": True}, FP8),
    "experts in some layers": ("qwen3-moe", {"mlp_only_layers": [0]}, FP8),
}


class IdleUtils(Utils):
    """Loads kernels to no effect."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), 0, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {**super().get_device_properties(device), "max_shared_mem": 228 * 1024}


class IdleCard(AbsentCard):
    """Launches what it loads to no effect; the launchers are built where there is a driver library to link them to."""

    def __init__(self, facts: CardFacts) -> None:
        super().__init__(facts)
        self.utils = IdleUtils(facts)
        make = self.launcher_cls

        def idle(src: Any, metadata: Any) -> Any:
            if triton.knobs.nvidia.libcuda_path:
                make(src, metadata)
            return lambda *args: None

        self.launcher_cls = idle


TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 128,
}


class Case:
    """A tiny model of a family with the engine's settings on a card."""

    def __init__(self, name: str) -> None:
        from tests.paged_cases import CONFIGS

        family, model_changes, engine = CASES[name]
        plain = CONFIGS[family]()
        values = {k: v for k, v in plain.to_dict().items() if k != "layer_types"}
        self.transformers_config = type(plain)(**{**values, "dtype": "bfloat16", **model_changes})
        with TemporaryDirectory() as folder:
            self.transformers_config.save_pretrained(folder)
            self.model_config = json.loads((Path(folder) / "config.json").read_text())
        self.config = EngineConfig(model="tiny", **{**SIZES, **engine})

    def model(self, device: str) -> PagedModel:
        """The real one."""
        import transformers

        dtype = self.config.dtype
        model = transformers.AutoModelForCausalLM.from_config(
            self.transformers_config,
            dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        ).to(device)
        return make_paged_model(model, fused, is_fp8=self.config.quantization == "fp8")

    def settings(self) -> PagedSettings:
        """Those of the real model on a card."""
        return PagedSettings.of(self.config, self.model("meta"))

    def compare(self) -> dict[str, Any]:
        """Foretell, then warm up the real model, in host memory with real addresses."""
        foretold = set(variants(self.model_config, self.config))
        absent = FusedModel(AbsentModel(self.model_config, self.config.dtype), fused)
        settings = self.settings()
        with noted_instead_of_compiled() as asked:
            run_all(self.model("cpu"), settings)
        return {
            "num_foretold": len(foretold),
            "not_foretold": [dataclasses.astuple(v) for v in set(asked) - foretold],
            "not_asked": [dataclasses.astuple(v) for v in foretold - set(asked)],
            "same_settings": PagedSettings.of(self.config, absent) == settings,
        }

    def compile(self) -> dict[str, Any]:
        """Compile ahead, then warm up the real model, which is to find all of it."""
        hits: list[bool] = []

        def listen(*, cache_hit: bool, **_: Any) -> None:
            hits.append(cache_hit)

        task = task_for(FACTS, self.model_config, self.config, 2)
        was_done = is_done(task)
        with Precompile(task) as kernels:
            kernels.wait(patience_s=600)  # however slow the machine
        before = num_cached()
        triton.knobs.compilation.listener = listen
        run_all(self.model("cpu"), self.settings())
        return {
            "was_done": was_done,
            "is_done": is_done(task_for(FACTS, self.model_config, self.config, 1)),
            "found": sum(hits),
            "compiled": len(hits) - sum(hits),
            "cached_before": before,
            "cached_after": num_cached(),
        }


def num_cached() -> int:
    """Kernels and C extensions in Triton's cache."""
    return len(list(Path(triton.knobs.cache.dir).iterdir()))


def main() -> None:
    torch.set_num_threads(1)
    IdleCard(FACTS).activate()
    variants(TINY, EngineConfig(model="tiny", **SIZES))
    needed = {"transformers": "transformers" in sys.modules, "cuda": torch.cuda.is_initialized()}
    print(json.dumps(needed), flush=True)
    for name in CASES:
        print(json.dumps({"case": name, **Case(name).compare()}), flush=True)
    print(json.dumps(Case("dense").compile()))


if __name__ == "__main__":
    main()
