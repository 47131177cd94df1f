"""What a replica's device could do at best, and what it costs: the measure of a receipt."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from inference.backends.base import BackendInfo
from inference.errors import EngineConfigError, ModelError
from inference.hardware import GpuType, match_gpu
from inference.model_config import read_model_shape
from inference.model_shape import ModelShape
from tasks.hardware import hardware_of
from tasks.job import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """`shape` and `gpu` are None where the model or the device is not known: shares are then null."""

    shape: ModelShape | None = None
    gpu: GpuType | None = None
    num_gpus: int = 1
    dtype: str = "bfloat16"
    quantization: str = "none"
    kv_cache_dtype: str = "auto"
    price_per_hour: float | None = None

    @classmethod
    def of(cls, job: RunConfig, model_dir: Path, info: BackendInfo) -> "Yardstick":
        """Look the device up in the hardware file, and the model's sizes in its config."""
        try:
            known = hardware_of(job.hardware)
            shape = read_model_shape(model_dir) if (model_dir / "config.json").exists() else None
        except (EngineConfigError, ModelError):
            known, shape = [], None  # a model without a known shape runs all the same
        gpu = match_gpu(info.device, _device_bytes(), known)
        price = job.hardware.price_per_hour
        return cls(
            shape=shape,
            gpu=gpu,
            num_gpus=info.num_ranks,
            dtype=info.dtype,
            quantization=job.model.quantization,
            kv_cache_dtype=job.engine.kv_cache_dtype,
            price_per_hour=gpu.price_per_hour if price is None and gpu is not None else price,
        )

    def usd(self, seconds: float) -> float | None:
        """Dollars for so many seconds of this replica."""
        if self.price_per_hour is None:
            return None
        return seconds / 3600 * self.num_gpus * self.price_per_hour

    def prefill_share(self, num_tokens: int, mean_prompt: float, seconds: float) -> float | None:
        """Floating-point operations of prefill over what the data sheet allows in that time."""
        if self.shape is None or self.gpu is None or seconds <= 0 or not num_tokens:
            return None
        name = "fp8" if self.quantization == "fp8" and "fp8" in self.gpu.flops else self.dtype
        peak = self.gpu.flops.get(name)
        if peak is None:
            return None
        width = self.shape.num_layers * self.shape.num_attention_heads * self.shape.head_dim
        # Causal attention: half of the square of the prompt, products with K and with V.
        flops = num_tokens * (2 * self.shape.num_active_params + 2 * width * mean_prompt)
        return flops / (seconds * peak * self.num_gpus)

    def decode_share(self, num_steps: float, context_tokens: int, seconds: float) -> float | None:
        """Bytes of weights and KV cache that decoding had to read over what the memory allows.

        `context_tokens` is the sum over all decoded tokens of the tokens before them.
        """
        if self.shape is None or self.gpu is None or seconds <= 0 or num_steps <= 0:
            return None
        weights = self.shape.weight_bytes(self.dtype, self.quantization)
        kv_dtype = self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
        read = num_steps * weights + context_tokens * self.shape.kv_bytes_per_token(kv_dtype)
        return read / (seconds * self.gpu.bandwidth * self.num_gpus)


def _device_bytes() -> float:
    """Memory of the first device, if an engine has loaded torch; never loads it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0.0
    return float(torch.cuda.get_device_properties(0).total_memory)


def losses(
    seconds: Mapping[str, float], prefill_share: float | None, decode_share: float | None
) -> dict[str, float]:
    """Seconds that were not work at the roofline, by phase; without shares, engine phases count as work."""
    lost = {name: value for name, value in seconds.items() if name not in ("prefill", "decode")}
    for name, share in (("prefill", prefill_share), ("decode", decode_share)):
        if share is not None:
            lost[name] = seconds.get(name, 0.0) * max(0.0, 1 - share)
    return lost
