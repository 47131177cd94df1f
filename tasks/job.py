"""RunConfig: one run, spelled out, as frozen dataclasses without pydantic or YAML.

How and where it runs is in `tasks.job_machine`.

Each room owns its settings (`inference.config`, `inference.sampling`, `storage.object_store`); this
module composes them. `flows.config` turns a job file into a `RunConfig`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_type_hints

from inference.config import Dtype, Quantization
from inference.sampling import SamplingParams
from storage.manifest import RunRecord
from storage.object_store import StorageConfig
from tasks.job_machine import BudgetConfig, CanaryConfig, EngineKnobs, HardwareConfig, MetricsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which weights, and how they are held."""

    source: str
    """A folder, `s3://bucket/prefix/`, or `hf://org/repo@revision`."""

    dtype: Dtype = "auto"
    """Element type of weights and activations; auto: what the model's config says."""

    quantization: Quantization = "none"
    """fp8 for speed, int8 and nf4 (bitsandbytes) for capacity."""

    allowed_code: list[str] = field(default_factory=list)
    """SHA-256 of config files that may name Python code (`auto_map`): it is not run, and the class that
    transformers ships is loaded in its place. A refusal names the hash to give."""

    trust_remote_code: bool = False
    """Only `false` is accepted: Python code from model folders is never run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputConfig:
    """Which rows, and how a row becomes a prompt."""

    uri: str | list[str]
    """File, folder, glob or list of them; local, `s3://` or `hf://datasets/...`."""

    format: Literal["auto", "parquet", "jsonl", "csv", "openai-batch", "dataset"] = "auto"
    """auto: by each file's name and first bytes."""

    prompt: str | None = None
    """A template over columns, such as `Summarise: {text}`."""

    prompt_column: str | None = None
    """Column of whole prompts. Without any of the three a column `messages`, `prompt` or `text` is taken."""

    messages_column: str | None = None
    """Column of conversations: lists of messages with `role` and `content`, or their JSON."""

    tools_column: str | None = None
    """Column of tool definitions given to the chat template beside messages."""

    id_column: str | None = None
    """Unique per row; when given, a row's random draws follow its id instead of its position."""

    chat_template: str = "auto"
    """auto (the model's own), none (prompts go in raw), or a Jinja file."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking: false`."""

    on_overlong: Literal["error", "truncate_left", "truncate_right"] = "error"
    """What becomes of a prompt that leaves no room in max_model_len: a row `overlong`, or its beginning or
    end is cut off."""

    on_bad_file: Literal["fail", "skip_with_error_rows"] = "fail"
    """A file or line that cannot be read ends the plan, or is `invalid_input` in its place."""

    on_duplicate_id: Literal["fail", "allow"] = "fail"
    """An id that is there twice ends the plan, or is let through: rows that share one share their draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Run-wide sampling; columns named like these fields, but for `n` and `logprobs`, override them per row."""

    max_tokens: int = 512
    """Most completion tokens."""

    min_tokens: int = 0
    """No end token or stop string is honoured before this many completion tokens."""

    temperature: float = 0.0
    """0 is greedy and exact."""

    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""

    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""

    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""

    repetition_penalty: float = 1.0
    """Divide positive, multiply negative logits of tokens seen in prompt or completion."""

    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already in the completion."""

    frequency_penalty: float = 0.0
    """Subtracted per occurrence from the logit of each token already in the completion."""

    stop: str | list[str] = field(default_factory=list)
    """Strings that end the completion; the text is cut before the first of them."""

    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end the completion, besides the model's own; not part of the text."""

    ignore_eos: bool = False
    """Go on past the model's end tokens (benchmarks)."""

    seed: int = 0
    """Every draw derives from this, the row and the sample."""

    n: int = 1
    """Completions per row, each an output row with a `sample_index`."""

    logprobs: int | None = None
    """Log-probabilities to keep per token: the chosen one's and this many most likely; null: none."""

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
    """Folder, `file://` or `s3://bucket/prefix/`; each run has a folder of its own in it."""

    columns: Literal["all"] | list[str] = "all"
    """Input columns to copy through."""

    rename: dict[str, str] = field(default_factory=dict)
    """Input column -> name in the output, for names that clash with result columns."""

    token_ids: bool = False
    """Add a column with the completion's tokens."""

    private: bool = False
    """Keep prompts and completions out of reports and letters; counts and lengths stay."""

    history: str | None = None
    """Where lengths and speeds of earlier runs are kept, for forecasts; default: `_history/` beside
    the results, above any `{date}` part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    """How the input is cut."""

    target_tokens: int = 2_000_000
    """Prompt tokens of a shard, about."""

    max_rows: int = 50_000
    """Most rows of a shard, whatever their length."""

    max_attempts: int = 3
    """Tries per shard and invocation before it is reported as failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run, spelled out."""

    model: ModelConfig
    input: InputConfig
    output: OutputConfig
    name: str = "run"
    """Begins the run's id, and is what its history goes by."""

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
