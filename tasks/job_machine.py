"""The settings of a job that say how and where it runs, at what price, and how it is watched."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from inference.config import Auto, Backend, DistributedConfig, KVCacheDtype, Offload
from tasks.provision import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKnobs:
    """The engine's knobs, under vLLM's names."""

    backend: Backend = "auto"
    """What runs the model: paged, zero, transformers or dummy; auto: transformers on the CPU; on GPUs, those of
    the replicas, paged, or zero where they cannot hold the weights, or transformers for what paged cannot run."""

    max_num_seqs: int | Auto = "auto"
    """Most sequences running at once; auto: what the memory holds."""

    max_num_batched_tokens: int | Auto = "auto"
    """Token budget of one step: prefill chunks plus one token per decoding sequence."""

    max_model_len: int | Auto = "auto"
    """Longest prompt plus completion, in tokens; auto: what the model's config says."""

    kv_cache_dtype: KVCacheDtype = "auto"
    """Element type of the KV cache; auto: the model's own."""

    tensor_parallel_size: int | Auto = "auto"
    """Devices that hold one replica's model between them; auto: what the sizing says. Part of the fingerprint as
    it is written: in fp32 it changes no token, in bf16 sums of another order may."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How the ranks of one replica are started and reach each other."""

    enforce_eager: bool = False
    """Launch kernels one by one instead of replaying captured CUDA graphs: slower, for finding faults."""

    offload: Offload = "auto"
    """Where weights live that the GPU does not hold: none, cpu or nvme; auto: cpu, then for the zero
    backend nvme. Changes no token; the paged backend takes auto and none."""

    nvme_path: str | None = None
    """Folder on the worker's NVMe disk, for `offload: nvme`."""

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica; one unless the job asks for more."""
        return 1 if self.tensor_parallel_size == "auto" else self.tensor_parallel_size


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareConfig:
    """Where it runs."""

    provider: Literal["local", "process", "kubernetes", "ecs", "command"] = "local"
    """local: in the process that is started; the others: on Prefect's pool of that name."""

    tier: str = "auto"
    """auto (chosen by the sizing), a GPU type such as `H100`, or `4x H100` for four to a replica."""

    replicas: int | Auto = "auto"
    """Engines at once; auto: locally one for the visible GPUs that hold one, else what the deadline needs."""

    max_replicas: int | Auto = "auto"
    """Most replicas at once when the deadline asks for more; auto: the pool's own limit, else 8."""

    replica_minutes: int = 240
    """A replica claims no further shard after this long; the next wave goes on."""

    placement: Placement = field(default_factory=Placement)
    """Image, node selector, launcher and job variables that the platform's owner fixes."""

    stage_to: str = "auto"
    """auto (the fastest local disk that the weights fit; a folder that fits none is read in place), none (read
    weights in place), shm, nvme, or a folder."""

    stage_budget: str | int | None = None
    """Most bytes that staged models may take in one cache, such as `200GB`: the least recently used go, pinned ones
    stay. null: what the disk holds."""

    price_per_hour: float | None = None
    """US dollars for one GPU (or one replica without one) and hour; default: the hardware file's. It prices one
    GPU type, so where replicas are elsewhere it goes with a `tier` that names it."""

    file: str | None = None
    """Hardware file with your GPU types and prices, read where the job is started; default: the one that comes
    along."""

    gpus: Mapping[str, Mapping[str, Any]] | None = None
    """The GPU types themselves, in that file's form; what `file` becomes, so that replicas elsewhere know them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """What a run may cost."""

    usd: float | None = None
    """US dollars; no shard is begun that they do not cover. null: any sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryConfig:
    """A sample that is run, and judged, before the rest; its answers are kept."""

    rows: int = 64
    """Rows of the sample; 0: none. Runs of fewer than ten times as many rows have none."""

    max_error_rate: float | None = 0.1
    """Most sequences the engine may fail on, as a share; null: any."""

    max_truncated_rate: float | None = None
    """Most sequences that may reach max_tokens, as a share."""

    max_repetitive_rate: float | None = 0.5
    """Most sequences that may end in circles, as a share."""

    max_length_factor: float | None = 4.0
    """How many times longer or shorter than in the last good run completions may be on average."""

    max_slowdown: float | None = None
    """How many times slower than the last good run's canary, on the same device, it may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Where replicas show what they do; off unless asked for."""

    port: int | None = None
    """Prometheus scrapes here; replicas of one machine take the next free ports."""

    host: str = "127.0.0.1"
    """Address to listen on; nothing is asked of whoever connects."""

    textfile_dir: str | None = None
    """Folder of node_exporter's textfile collector."""
