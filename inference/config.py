"""EngineConfig: what one replica is, independent of any prompt."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from inference.errors import EngineConfigError
from inference.sampling_needs import GREEDY, SamplingNeeds

Auto = Literal["auto"]
Backend = Literal["auto", "paged", "zero", "transformers", "dummy"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Quantization = Literal["none", "fp8", "int8", "nf4"]
KVCacheDtype = Literal["auto", "bfloat16", "float16", "float32", "fp8"]
Offload = Literal["auto", "none", "cpu", "nvme"]

_CHOICES = {
    "backend": Backend,
    "dtype": Dtype,
    "quantization": Quantization,
    "kv_cache_dtype": KVCacheDtype,
    "offload": Offload,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedConfig:
    """How the ranks of one replica find and reach each other; the defaults are right on one host."""

    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    """What starts a host's ranks."""

    num_hosts: int = 1
    """Hosts that one replica is spread over, evenly."""

    rendezvous: str = ""
    """`host:port` of the first host, reachable from all; needed with several hosts."""

    interface: str = ""
    """Network interface between hosts, such as `eth0`; default: what NCCL and gloo pick."""

    fabric: Literal["auto", "infiniband", "roce", "tcp"] = "auto"
    """auto: the fastest that NCCL finds. Naming infiniband or roce makes its absence an error instead of a slow run."""

    timeout_s: float = 300.0
    """A collective that takes longer ends the replica."""

    min_bandwidth: float = 0.0
    """GB/s of bus bandwidth that the all-reduce before loading must reach; 0: measured, only reported."""

    def __post_init__(self) -> None:
        if self.num_hosts < 1:
            raise ValueError(
                f"engine.distributed.num_hosts must be at least 1, got {self.num_hosts}"
            )
        host, _, port = self.rendezvous.rpartition(":")
        if self.rendezvous and not (host and port.isdigit()):
            raise ValueError(
                f"engine.distributed.rendezvous must be host:port, got {self.rendezvous!r}"
            )
        if self.num_hosts > 1 and not self.rendezvous:
            raise ValueError(
                f"engine.distributed.num_hosts is {self.num_hosts}: needs engine.distributed.rendezvous, "
                f"host:port of the first host"
            )
        if self.timeout_s <= 0:
            raise ValueError(f"engine.distributed.timeout_s must be above 0, got {self.timeout_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What one replica is, independent of any prompt. Knobs keep vLLM's names.

    Raises EngineConfigError, which names the field and what it may be.
    """

    model: str
    """Local folder holding config.json, a tokenizer and safetensors; ignored by the dummy backend."""

    backend: Backend = "auto"
    """auto: paged on CUDA, else transformers."""

    dtype: Dtype = "auto"
    """auto: what the model's config says."""

    allowed_code: tuple[str, ...] = ()
    """SHA-256 of config files whose `auto_map` is ignored: transformers' own class is loaded, no code is run."""

    quantization: Quantization = "none"
    """fp8 for speed; int8 and nf4 (bitsandbytes) for capacity."""

    max_num_seqs: int | Auto = "auto"
    """Most sequences running at once."""

    max_num_batched_tokens: int | Auto = "auto"
    """Token budget of one step: prefill chunks plus one token per decoding sequence."""

    max_model_len: int | Auto = "auto"
    """Longest prompt plus completion, in tokens; auto: what the model's config says."""

    kv_cache_dtype: KVCacheDtype = "auto"
    """Element type of the KV cache; auto: the model's dtype."""

    tensor_parallel_size: int = 1
    """Ranks one replica is spread over; of the zero backend, each with rows of its own."""

    offload: Offload = "auto"
    """Where weights live that the device does not hold: see `inference.offload`. Changes no token."""

    nvme_path: str | None = None
    """Folder on a local NVMe disk, for `offload: nvme`."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How ranks are started and reach each other."""

    enforce_eager: bool = False
    """Launch every step kernel by kernel instead of replaying captured CUDA graphs: slower, for finding faults."""

    spare_bytes: int = 0
    """Device memory that the KV cache leaves alone; set when ranks start again after running out of it."""

    sampling_needs: SamplingNeeds = GREEDY
    """What the run is expected to sample with, so that no graph is captured in the middle of it. Changes no token."""

    seed: int = 0
    """The run's seed; a sequence's own draw comes from `Sequence.draw_seed`."""

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            *others, last = get_args(kind)
            if (value := getattr(self, name)) not in (*others, last):
                raise EngineConfigError(
                    f"engine.{name} is {value!r}: use {', '.join(others)} or {last}"
                )
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            value = getattr(self, name)
            if value != "auto" and not (isinstance(value, int) and value >= 1):
                raise EngineConfigError(f"engine.{name} must be at least 1 or auto, got {value!r}")
        ranks = self.tensor_parallel_size
        if not (isinstance(ranks, int) and ranks >= 1):
            raise EngineConfigError(
                f"engine.tensor_parallel_size must be at least 1, got {ranks!r}"
            )
        if ranks % self.distributed.num_hosts:
            raise EngineConfigError(
                f"engine.tensor_parallel_size is {ranks}: does not divide over "
                f"{self.distributed.num_hosts} hosts"
            )


def config_from_json(values: dict[str, Any]) -> EngineConfig:
    """The config whose `dataclasses.asdict` went through JSON."""
    distributed = DistributedConfig(**values["distributed"])
    needs = SamplingNeeds(*values["sampling_needs"])
    allowed_code = tuple(values["allowed_code"])
    return EngineConfig(
        **{
            **values,
            "distributed": distributed,
            "sampling_needs": needs,
            "allowed_code": allowed_code,
        }
    )
