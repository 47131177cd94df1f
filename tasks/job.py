"""RunConfig: one run, spelled out, as frozen dataclasses without pydantic or YAML.

Each room owns its settings (`inference.config`, `inference.sampling`, `storage.object_store`); this
module composes them. `flows.config` turns a job file into a `RunConfig`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_type_hints

from inference.config import (
    Auto,
    Backend,
    DistributedConfig,
    Dtype,
    KVCacheDtype,
    Offload,
    Quantization,
)
from inference.sampling import SamplingParams
from storage.manifest import RunRecord
from storage.object_store import StorageConfig
from tasks.provision import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which weights, and how they are held."""

    source: str
    """A folder, `s3://bucket/prefix/`, or `hf://org/repo@revision`."""

    dtype: Dtype = "auto"
    quantization: Quantization = "none"
    trust_remote_code: bool = False
    """Only `false` is accepted: Python code from model folders is never run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputConfig:
    """Which rows, and how a row becomes a prompt."""

    uri: str | list[str]
    """File, folder, glob or list of them; local, `s3://` or `hf://datasets/...`."""

    format: Literal["auto", "parquet", "jsonl", "csv", "openai-batch", "dataset"] = "auto"
    prompt: str | None = None
    """A template over columns, such as `Summarise: {text}`."""

    prompt_column: str | None = None
    messages_column: str | None = None
    tools_column: str | None = None
    """Column of tool definitions given to the chat template beside messages."""

    id_column: str | None = None
    """Unique per row; when given, a row's random draws follow its id instead of its position."""

    chat_template: str = "auto"
    """auto (the model's own), none (prompts go in raw), or a Jinja file."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    on_overlong: Literal["error", "truncate_left", "truncate_right"] = "error"
    on_bad_file: Literal["fail", "skip_with_error_rows"] = "fail"
    on_duplicate_id: Literal["fail", "allow"] = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Run-wide sampling; columns named like these fields override them per row."""

    max_tokens: int = 512
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    seed: int = 0
    n: int = 1
    logprobs: int | None = None

    def params(self) -> SamplingParams:
        """Return the same as the engine takes it. Raises ValueError naming the field."""
        values = dataclasses.asdict(self)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return SamplingParams(
            **{**values, "stop": tuple(stop), "stop_token_ids": tuple(self.stop_token_ids)}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """Where results go, and which columns they carry."""

    uri: str
    columns: Literal["all"] | list[str] = "all"
    """Input columns to copy through."""

    rename: dict[str, str] = field(default_factory=dict)
    """Input column -> name in the output, for names that clash with result columns."""

    token_ids: bool = False
    private: bool = False
    """Keep prompts and completions out of reports and letters; counts and lengths stay."""

    history: str | None = None
    """Where lengths and speeds of earlier runs are kept, for forecasts; default: `_history/` beside
    the results, above any `{date}` part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    """How the input is cut."""

    target_tokens: int = 2_000_000
    max_rows: int = 50_000
    max_attempts: int = 3
    """Tries per shard and invocation before it is reported as failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKnobs:
    """The engine's knobs, under vLLM's names."""

    backend: Backend = "auto"
    max_num_seqs: int | Auto = "auto"
    max_num_batched_tokens: int | Auto = "auto"
    max_model_len: int | Auto = "auto"
    kv_cache_dtype: KVCacheDtype = "auto"
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
    tier: str = "auto"
    """auto (chosen by the sizing), a GPU type such as `H100`, or `4x H100` for four to a replica."""

    replicas: int | Auto = "auto"
    max_replicas: int | Auto = "auto"
    """Most replicas at once when the deadline asks for more; auto: the pool's own limit, else 8."""

    replica_minutes: int = 240
    """A replica claims no further shard after this long; the next wave goes on."""

    placement: Placement = field(default_factory=Placement)
    """Image, node selector, launcher and job variables that the platform's owner fixes."""

    stage_to: str = "auto"
    """auto, none (read weights in place), or a folder."""

    price_per_hour: float | None = None
    """US dollars for one GPU (or one replica without one) and hour; default: the hardware file's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """What a run may cost."""

    usd: float | None = None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run, spelled out."""

    model: ModelConfig
    input: InputConfig
    output: OutputConfig
    name: str = "run"
    run_id: str | None = None
    """Default: the name and a digest of the fingerprint and of the inputs' ETags."""

    timezone: str = "UTC"
    """Decides which day `{date}` means."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sampling_columns: Literal["auto"] | list[str] = "auto"
    """Columns that override sampling per row; auto: those named like a sampling field."""

    storage: StorageConfig = field(default_factory=StorageConfig)
    shards: ShardConfig = field(default_factory=ShardConfig)
    engine: EngineKnobs = field(default_factory=EngineKnobs)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    max_failed_rows: int | None = None
    """More failed rows than this end the run with exit code 5; null: any number."""

    reuse_from: str | list[str] | None = None
    """Earlier run folders, or `last` for this job's last published run: rows they answered `ok` under the
    same weights, engine settings, prompt and sampling are copied, not generated."""

    deadline: str | None = None
    """When the run should be published: `06:00 Europe/Berlin`; without a zone, in the job's."""

    budget: BudgetConfig = field(default_factory=BudgetConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    canary: CanaryConfig = field(default_factory=CanaryConfig)


def job_of(record: RunRecord) -> RunConfig:
    """Rebuild the job a run was made of. Fields of later versions take their defaults."""
    return cast(RunConfig, _built(RunConfig, record.job))


def _built(cls: Any, values: dict[str, Any]) -> Any:
    hints = get_type_hints(cls)
    kwargs = {
        f.name: _built(hints[f.name], values[f.name])
        if dataclasses.is_dataclass(hints[f.name])
        else values[f.name]
        for f in dataclasses.fields(cls)
        if f.name in values
    }
    return cls(**kwargs)
