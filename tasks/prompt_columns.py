"""Which columns make the prompt, the id and the parameters of a row; settled once, before any row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from inference.prompt_template import PromptTemplate
from inference.row_sampling import ROW_FIELDS, RUN_WIDE
from storage.errors import BadInput
from tasks.job import InputConfig, RunConfig

Kind = Literal["template", "text", "messages", "openai"]
OPENAI_COLUMNS = ("custom_id", "url", "body")
_AUTO = ("messages", "prompt", "text")


@dataclass(frozen=True, slots=True)
class PromptColumns:
    """How a row becomes a request."""

    kind: Kind
    prompt: str | None
    """The text or messages column; None for a template and for OpenAI bodies."""

    template: PromptTemplate | None
    tools: str | None
    id: str | None
    sampling: tuple[str, ...]

    @property
    def required(self) -> tuple[str, ...]:
        """Columns every file with rows must have."""
        if self.kind == "openai":
            return ("body",)
        fields = self.template.fields if self.template else (str(self.prompt),)
        return (*fields, self.id) if self.id else fields

    @property
    def used(self) -> frozenset[str]:
        """All columns a row is made of."""
        extra = OPENAI_COLUMNS if self.kind == "openai" else ()
        optional = (self.tools, self.id)
        named = (name for name in optional if name is not None)
        return frozenset((*self.required, *extra, *named, *self.sampling))

    def to_json(self) -> dict[str, Any]:
        """Return what the plan keeps of this; the template itself is the job's."""
        values = {"kind": self.kind, "prompt": self.prompt, "tools": self.tools, "id": self.id}
        return {**values, "sampling": list(self.sampling)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], template: str | None) -> "PromptColumns":
        """Read back what a plan keeps; `template` is the job's `input.prompt`."""
        return cls(
            kind=value["kind"],
            prompt=value["prompt"],
            template=PromptTemplate(template or "") if value["kind"] == "template" else None,
            tools=value["tools"],
            id=value["id"],
            sampling=tuple(value["sampling"]),
        )


def candidate_columns(job: RunConfig) -> frozenset[str]:
    """Return every column a prompt or parameter might be made of, before the columns are known."""
    config = job.input
    template = PromptTemplate(config.prompt).fields if config.prompt is not None else ()
    named = (config.prompt_column, config.messages_column, config.tools_column, config.id_column)
    sampling = ROW_FIELDS if job.sampling_columns == "auto" else tuple(job.sampling_columns)
    given = tuple(name for name in named if name is not None)
    return frozenset((*template, *given, *sampling, *_AUTO, "tools", *OPENAI_COLUMNS))


def text_columns(config: InputConfig) -> frozenset[str]:
    """Return the CSV columns that must stay text, whatever they look like."""
    named = (config.prompt_column, config.messages_column, config.tools_column, config.id_column)
    template = PromptTemplate(config.prompt).fields if config.prompt is not None else ()
    return frozenset((*(name for name in named if name is not None), *template, *_AUTO, "tools"))


def choose_columns(
    job: RunConfig, columns: Mapping[str, Any], *, is_openai: bool, where: str
) -> PromptColumns:
    """Settle the columns; `columns` maps every input column to its Arrow type.

    Raises:
        BadInput: a column is missing or of the wrong type, or it is not clear what to use; the
            message names what exists.
        EngineConfigError: the prompt template is malformed.
    """
    config = job.input
    sampling = _sampling_columns(job, columns, where)
    if is_openai:
        return _openai_columns(job, sampling)
    given = [config.prompt, config.prompt_column, config.messages_column]
    if sum(value is not None for value in given) > 1:
        raise BadInput("give one of input.prompt, input.prompt_column and input.messages_column")
    chosen = _chosen(config, columns, where)
    missing = [name for name in chosen.used - set(sampling) if name not in columns]
    if missing:
        raise BadInput(
            f"{where}: no column {sorted(missing)[0]!r}; there are: {', '.join(columns) or 'none'}"
        )
    _check_types(chosen, columns, where)
    return PromptColumns(
        chosen.kind, chosen.prompt, chosen.template, chosen.tools, chosen.id, sampling
    )


def _openai_columns(job: RunConfig, sampling: tuple[str, ...]) -> PromptColumns:
    config = job.input
    if config.prompt or config.prompt_column or config.messages_column or config.tools_column:
        raise BadInput(
            "the input is an OpenAI batch, whose prompts are in body; drop input.prompt, "
            "prompt_column, messages_column and tools_column, or set input.format to jsonl"
        )
    given = () if job.sampling_columns == "auto" else sampling
    return PromptColumns("openai", None, None, None, config.id_column or "custom_id", given)


def _chosen(config: InputConfig, columns: Mapping[str, Any], where: str) -> PromptColumns:
    tools = config.tools_column
    if config.prompt is not None:
        template = PromptTemplate(config.prompt)
        return PromptColumns("template", None, template, None, config.id_column, ())
    if config.prompt_column is not None:
        return PromptColumns("text", config.prompt_column, None, None, config.id_column, ())
    column = config.messages_column
    if column is None:
        found = [name for name in _AUTO if name in columns]
        if len(found) != 1:
            raise BadInput(_unclear(found, columns, where))
        column = found[0]
        if column != "messages":
            return PromptColumns("text", column, None, None, config.id_column, ())
    if tools is None and "tools" in columns:
        tools = "tools"
    return PromptColumns("messages", column, None, tools, config.id_column, ())


def _unclear(found: list[str], columns: Mapping[str, Any], where: str) -> str:
    remedy = "set input.prompt, input.prompt_column or input.messages_column"
    if found:
        return f"{where}: columns {' and '.join(found)} could both be the prompt; {remedy}"
    return f"{where}: no column messages, prompt or text; {remedy} (there are: {', '.join(columns) or 'none'})"


def _sampling_columns(job: RunConfig, columns: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if job.sampling_columns == "auto":
        template = PromptTemplate(job.input.prompt).fields if job.input.prompt is not None else ()
        named = {*template, job.input.prompt_column, job.input.messages_column, job.input.id_column}
        return tuple(name for name in ROW_FIELDS if name in columns and name not in named)
    for name in job.sampling_columns:
        if name in RUN_WIDE:
            raise BadInput(f"sampling_columns: {name} cannot differ per row; set sampling.{name}")
        if name not in ROW_FIELDS:
            raise BadInput(f"sampling_columns: {name!r} is not one of {', '.join(ROW_FIELDS)}")
        if name not in columns:
            have = ", ".join(columns) or "none"
            raise BadInput(f"{where}: no column {name!r} (sampling_columns); there are: {have}")
    return tuple(job.sampling_columns)


def _check_types(chosen: PromptColumns, columns: Mapping[str, Any], where: str) -> None:
    if chosen.prompt is None:
        return
    kind = columns[chosen.prompt]
    if chosen.kind == "text" and not _is_text(kind):
        raise BadInput(
            f"{where}: column {chosen.prompt!r} is {kind}, not text; to format it, set "
            f"input.prompt to '{{{chosen.prompt}}}'"
        )
    if chosen.kind == "messages" and not (_is_text(kind) or _is_list(kind)):
        raise BadInput(f"{where}: column {chosen.prompt!r} is {kind}, not messages")


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    kind = getattr(kind, "storage_type", kind)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_null,
    )
    return any(test(kind) for test in tests)


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
