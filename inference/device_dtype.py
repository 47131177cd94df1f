"""Which number format this machine computes in, where `dtype` leaves it open."""

import logging
from dataclasses import replace
from typing import Any

from inference.config import EngineConfig
from inference.errors import ModelError
from inference.model_config import model_shape
from inference.offload import HOST_MEMORY_SHARE, free_host_bytes
from inference.weights import check_small_files

logger = logging.getLogger(__name__)


def with_dtype_of_device(config: EngineConfig) -> EngineConfig:
    """Return the config in a number format that this machine has instructions for.

    A GPU without bfloat16, such as a T4, runs in float16. A CPU without matrix instructions for a 16-bit
    format runs in float32 where `dtype` is auto and the memory suffices: a product of 32 rows was measured
    6 times as fast as in bfloat16.

    Raises:
        ModelError: the model's config.json cannot be read.
    """
    import torch

    if torch.cuda.is_available():
        if torch.cuda.get_device_capability() >= (8, 0) or _dtype(config) != "bfloat16":
            return config
        logger.warning("%s has no bfloat16: weights run in float16", torch.cuda.get_device_name())
        return replace(config, dtype="float16")
    if config.dtype != "auto" or config.quantization != "none":
        return config
    dtype = _dtype(config)
    if _is_native_on_cpu(dtype):
        return config
    if not _fits_in_float32(config):
        logger.warning(
            "this CPU has no %s instructions and too little memory for float32: expect it to be slow",
            dtype,
        )
        return config
    logger.warning(
        "this CPU has no %s instructions: weights run in float32, twice as large; model.dtype %s keeps them",
        dtype,
        dtype,
    )
    return replace(config, dtype="float32")


def _dtype(config: EngineConfig) -> str:
    if config.dtype != "auto":
        return config.dtype
    found: dict[str, Any] = check_small_files(config.model, config.allowed_code).config
    found = {**found, **(found.get("text_config") or {})}
    return str(found.get("dtype") or found.get("torch_dtype")).removeprefix("torch.")


def _is_native_on_cpu(dtype: str) -> bool:
    """Ask as torch does before it takes a oneDNN kernel; without one it falls back to scalar loops."""
    import torch

    if dtype not in ("bfloat16", "float16"):
        return True
    short = "bf16" if dtype == "bfloat16" else "fp16"
    is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported", None)
    return is_supported is not None and bool(is_supported())


def _fits_in_float32(config: EngineConfig) -> bool:
    try:
        weights = model_shape(
            check_small_files(config.model, config.allowed_code).config
        ).weight_bytes("float32")
        return weights <= HOST_MEMORY_SHARE * free_host_bytes()
    except (ModelError, OSError):  # a family whose size is not known, or a system without /proc
        return False
