"""EngineConfig: what one replica is, independent of any prompt."""

from dataclasses import dataclass
from typing import Literal

Auto = Literal["auto"]
Backend = Literal["auto", "paged", "zero", "transformers", "dummy"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Quantization = Literal["none", "fp8", "int8", "nf4"]
Offload = Literal["auto", "none", "cpu", "nvme"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What one replica is, independent of any prompt. Knobs keep vLLM's names."""

    model: str
    """Local folder holding config.json, a tokenizer and safetensors; ignored by the dummy backend."""

    backend: Backend = "auto"
    """auto: paged on CUDA, else transformers."""

    dtype: Dtype = "auto"
    """auto: what the model's config says."""

    quantization: Quantization = "none"
    """fp8 for speed; int8 and nf4 (bitsandbytes) for capacity."""

    max_num_seqs: int | Auto = "auto"
    """Most sequences running at once."""

    max_num_batched_tokens: int | Auto = "auto"
    """Token budget of one step: prefill chunks plus one token per decoding sequence."""

    max_model_len: int | Auto = "auto"
    """Longest prompt plus completion, in tokens; auto: what the model's config says."""

    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8"] = "auto"
    """Element type of the KV cache; auto: the model's dtype."""

    tensor_parallel_size: int = 1
    """Ranks one replica is spread over."""

    offload: Offload = "auto"
    """Where weights live that the device does not hold: see `inference.offload`. Changes no token."""

    nvme_path: str | None = None
    """Folder on a local NVMe disk, for `offload: nvme`."""

    seed: int = 0
    """The run's seed; a sequence's own draw comes from `Sequence.draw_seed`."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"engine.{name} must be at least 1 or auto, got {value}")
        if self.tensor_parallel_size < 1:
            raise ValueError(
                f"engine.tensor_parallel_size must be at least 1, got {self.tensor_parallel_size}"
            )
