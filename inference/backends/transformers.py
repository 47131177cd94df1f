"""TransformersBackend: the reference. Right before fast: see `inference.backends.static_backend`."""

from dataclasses import replace
from typing import Any

import torch

from inference.backends import check_engine
from inference.backends.static_backend import (
    StaticBackend,
    StaticLimits,
    resolve,
)
from inference.config import EngineConfig
from inference.errors import EngineConfigError
from inference.loading import load_model
from inference.roofline import STATIC_NUM_SEQS, STATIC_PASS_TOKENS
from inference.weights import ModelFolder

_DEFAULT_MAX_NUM_SEQS = {"cpu": 32, "cuda": STATIC_NUM_SEQS}
_DEFAULT_MAX_NUM_BATCHED_TOKENS = {"cpu": 8_192, "cuda": STATIC_PASS_TOKENS}


class TransformersBackend(StaticBackend):
    """One process; weights that the device does not hold are lent to it by accelerate, layer by layer."""

    name = "transformers"

    def _check(self, folder: ModelFolder, config: EngineConfig) -> None:
        if config.tensor_parallel_size != 1:
            raise EngineConfigError(
                f"engine.tensor_parallel_size is {config.tensor_parallel_size}: the transformers backend "
                f"runs in one process; use 1, or engine.backend paged"
            )
        if config.kv_cache_dtype not in ("auto", config.dtype):
            raise EngineConfigError(
                f"engine.kv_cache_dtype is {config.kv_cache_dtype}: the transformers backend keeps the "
                f"model's own; use auto, or engine.backend paged"
            )
        check_engine(folder, replace(config, backend="transformers"))

    def _load(self, folder: ModelFolder, config: EngineConfig) -> tuple[Any, torch.device]:
        model = load_model(folder, config)
        device: torch.device = model.get_input_embeddings().weight.device
        if device.type == "meta":  # offloaded by accelerate, whose hooks move inputs from here
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return model, device

    def _batch_limits(self, config: EngineConfig, max_model_len: int) -> StaticLimits:
        kind = "cuda" if self._device.type == "cuda" else "cpu"
        return StaticLimits(
            max_num_seqs=resolve(config.max_num_seqs, _DEFAULT_MAX_NUM_SEQS[kind]),
            max_pass_tokens=resolve(
                config.max_num_batched_tokens, _DEFAULT_MAX_NUM_BATCHED_TOKENS[kind]
            ),
        )

    def _memory(self) -> dict[str, int]:
        return {"weights": int(self._model.get_memory_footprint())}
