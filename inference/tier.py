"""Tier: one way to run a workload, and what is predicted of it. Also what was refused, and options."""

from dataclasses import dataclass

# Least change to the model first; `none` is the checkpoint as it is stored.
QUANTIZATIONS = ("none", "fp8", "int8", "nf4")
BITSANDBYTES = ("int8", "nf4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One way to run a workload, with what it is predicted to do."""

    gpu: str
    num_gpus: int
    memory_bytes: float
    """Of all its GPUs."""

    tensor_parallel_size: int
    replicas: int
    quantization: str
    dtype: str
    kv_cache_dtype: str
    backend: str
    """paged, transformers for what paged does not run, or zero when weights pass through the GPU once a step."""

    offload: str
    """Where the weights live: none (on the GPU), cpu or nvme."""

    num_hosts: int
    weight_bytes_per_gpu: int
    kv_bytes_per_gpu: int
    kv_tokens: int
    """Tokens one replica's KV cache holds."""

    num_running: int
    """Sequences one replica runs at once while its batch is full."""

    completion_tokens_per_s: float | None
    """All replicas together, start-up not counted. None where nothing is predicted: of such runs none was measured."""

    total_tokens_per_s: float | None
    """Prompt tokens counted too."""

    seconds: float | None
    """The whole run, start-up included."""

    usd_per_hour: float | None
    """Of all its GPUs."""

    usd: float | None
    usd_per_million_tokens: float | None
    """Dollars for a million completion tokens, start-up not counted."""

    reason: str = ""
    """One sentence; set on the tier that was chosen."""

    notes: tuple[str, ...] = ()

    @property
    def gpu_hours(self) -> float | None:
        """What the run takes off a pool, start-up included; None where nothing is predicted."""
        return None if self.seconds is None else self.num_gpus * self.seconds / 3600

    @property
    def has_kv_room(self) -> bool:
        """Whether KV cache outweighs weights: more memory would then at most halve what a token costs."""
        return self.kv_bytes_per_gpu >= self.weight_bytes_per_gpu

    @property
    def label(self) -> str:
        """For people: `2x H100, fp8, TP2, 1 replica`."""
        precision = self.dtype if self.quantization == "none" else self.quantization
        replicas = f"{self.replicas} replica{'s' if self.replicas > 1 else ''}"
        where = f", weights on {self.offload}" if self.offload != "none" else ""
        return (
            f"{self.num_gpus}x {self.gpu}, {precision}, TP{self.tensor_parallel_size}, "
            f"{replicas}{where}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A size that does not work, with the arithmetic."""

    gpu: str
    num_gpus: int
    quantization: str
    reason: str
    nearest: str = ""
    """Label of the nearest tier that fits; empty when none does."""

    def __str__(self) -> str:
        where = f"{self.num_gpus}x {self.gpu}, {self.quantization}"
        return f"{where}: {self.reason}" + (
            f"; nearest that fits: {self.nearest}" if self.nearest else ""
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user has fixed; everything else is searched."""

    dtype: str = "auto"
    quantizations: tuple[str, ...] = QUANTIZATIONS
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int | None = None
    replicas: int | None = None
    max_num_seqs: int | None = None
    """None: what the backend runs at once where it is not told."""

    backend: str = "auto"
    """paged refuses to offload, zero does nothing else; auto and transformers offload only what fits nowhere."""
