"""What a feed tells its child: settings as plain JSON, and the limits it works under."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from inference.errors import EngineConfigError
from inference.prompt import PromptConfig
from tasks.job import InputConfig, ModelConfig, OutputConfig, RunConfig, SamplingConfig

STATE_CODES = (None, "overlong", "invalid_input")
"""Row states by their number in a counting frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedLimits:
    """What the child may use before it is stopped."""

    memory_bytes: int = 1 << 30
    """Address space above that of its imports and the tokenizer."""

    read_bytes: int = 256 << 20
    """Of that, what reading one batch of a Parquet file may take: a page as it is stored, and decoded."""

    row_cpu_s: float = 5.0
    """Processor seconds one row's template may take."""

    reply_s: float = 120.0
    """Seconds the parent waits for a sign of life."""

    start_s: float = 300.0
    """Seconds the child may take to import and load the tokenizer."""

    max_hard_rows: int = 20
    """Rows that may run into the limits; one more, and the template is refused."""

    num_threads: int = 0
    """Tokenizer threads; 0: one per processor core, at most 8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedSpec:
    """One run's settings, as far as they make prompts."""

    model_dir: str
    allowed_code: list[str]
    max_model_len: int
    input: dict[str, Any]
    sampling: dict[str, Any]
    sampling_columns: str | list[str]
    output: dict[str, Any]
    row_cpu_s: float
    memory_bytes: int
    read_bytes: int
    max_hard_rows: int

    @classmethod
    def of(
        cls, job: RunConfig, *, model_dir: str, max_model_len: int, limits: FeedLimits
    ) -> "FeedSpec":
        return cls(
            model_dir=model_dir,
            allowed_code=job.model.allowed_code,
            max_model_len=max_model_len,
            input=dataclasses.asdict(job.input),
            sampling=dataclasses.asdict(job.sampling),
            sampling_columns=job.sampling_columns,
            output={"uri": "", "columns": job.output.columns, "rename": job.output.rename},
            row_cpu_s=limits.row_cpu_s,
            memory_bytes=limits.memory_bytes,
            read_bytes=limits.read_bytes,
            max_hard_rows=limits.max_hard_rows,
        )

    def job(self) -> RunConfig:
        """Rebuild the part of the job this was made of."""
        return RunConfig(
            model=ModelConfig(source=""),
            input=InputConfig(**self.input),
            output=OutputConfig(**self.output),
            sampling=SamplingConfig(**self.sampling),
            sampling_columns=self.sampling_columns,  # type: ignore[arg-type]
        )

    def prompt_config(self, *, has_messages: bool) -> PromptConfig:
        return PromptConfig(
            max_model_len=self.max_model_len,
            chat_template=self.input["chat_template"],
            chat_template_kwargs=self.input["chat_template_kwargs"],
            on_overlong=self.input["on_overlong"],
            allowed_code=tuple(self.allowed_code),
            has_messages=has_messages,
        )


def too_many_hard_rows(limit: int) -> EngineConfigError:
    """Return the refusal of a run whose rows keep running into the limits."""
    return EngineConfigError(
        f"more than {limit} rows took too long or too much memory to render or tokenise; the chat "
        "template or these prompts cannot be used"
    )
