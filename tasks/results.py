"""Completions to output rows: the one place where the engine's answer becomes a record."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from inference.sequence import Completion, TokenLogprob
from storage import records


class RowOutcome(NamedTuple):
    """What is known of one input row besides its own columns."""

    row_index: int
    num_prompt_tokens: int | None
    is_thinking: bool  # the rendered prompt ends inside an open <think>
    state: str | None  # set when the row never reached the engine
    error: str | None


class SampleKey(NamedTuple):
    """Which output row of a shard a sequence becomes."""

    offset: int  # row within the shard
    sample_index: int


class SampleResult(NamedTuple):
    """One output row's result columns, without its attempt."""

    row_index: int
    sample_index: int
    state: str
    completion: str | None
    reasoning: str | None
    finish_reason: str | None
    error: str | None
    num_prompt_tokens: int | None
    num_completion_tokens: int
    token_ids: Sequence[int] | None
    logprobs: tuple[TokenLogprob, ...] | None


@dataclass(frozen=True, slots=True)
class ResultColumns:
    """Which columns follow the input's own, and how samples become them."""

    token_ids: bool
    logprobs: bool

    @property
    def fields(self) -> list[Any]:
        """Arrow fields, in order."""
        return records.result_fields(token_ids=self.token_ids, logprobs=self.logprobs)

    def schema(self, input_schema: Any) -> Any:
        """Return the output schema: the input's columns, then ours."""
        return pa.schema([*input_schema, *self.fields])

    def arrays(self, samples: Sequence[SampleResult], attempt: int) -> list[Any]:
        """Return one array per field."""
        names = [f.name for f in self.fields if f.name in SampleResult._fields]
        columns: dict[str, list[Any]] = {n: [getattr(s, n) for s in samples] for n in names}
        columns["attempt"] = [attempt] * len(samples)
        if self.token_ids:
            columns["token_ids"] = [
                None if s.token_ids is None else list(s.token_ids) for s in samples
            ]
        if self.logprobs:
            columns["logprobs"] = [_logprob_rows(s.logprobs) for s in samples]
        return [pa.array(columns[f.name], f.type) for f in self.fields]


def unrun_sample(row: RowOutcome, sample_index: int) -> SampleResult:
    """Return the result of a row that was refused before the engine."""
    assert row.state is not None, row.row_index
    return SampleResult(
        row_index=row.row_index,
        sample_index=sample_index,
        state=row.state,
        completion=None,
        reasoning=None,
        finish_reason=None,
        error=row.error,
        num_prompt_tokens=row.num_prompt_tokens,
        num_completion_tokens=0,
        token_ids=None,
        logprobs=None,
    )


def sample_result(row: RowOutcome, sample_index: int, completion: Completion) -> SampleResult:
    """Return the result of a sequence the engine finished."""
    # In the body: detokenise is light, but the room's heavy parts must not load with this module.
    from inference.detokenise import split_reasoning

    if completion.finish_reason == "error":
        failed = row._replace(state=records.ENGINE_ERROR, error=completion.error)
        return unrun_sample(failed, sample_index)
    reasoning, text = split_reasoning(completion.text, row.is_thinking)
    return SampleResult(
        row_index=row.row_index,
        sample_index=sample_index,
        state=records.OK if completion.finish_reason == "stop" else records.TRUNCATED,
        completion=text,
        reasoning=reasoning,
        finish_reason=completion.finish_reason,
        error=None,
        num_prompt_tokens=row.num_prompt_tokens,
        num_completion_tokens=len(completion.token_ids),
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
    )


def stored_sample(row: dict[str, Any]) -> SampleResult:
    """Return an output row's result columns as they were before they were written."""
    values: dict[str, Any] = {name: row.get(name) for name in SampleResult._fields}
    if values["token_ids"] is not None:
        values["token_ids"] = array("i", values["token_ids"])  # a list takes ten times as much
    if values["logprobs"] is not None:
        values["logprobs"] = tuple(
            TokenLogprob(
                item["token_id"],
                item["logprob"],
                tuple((top["token_id"], top["logprob"]) for top in item["top"]),
            )
            for item in values["logprobs"]
        )
    return SampleResult(**values)


def count_states(samples: Sequence[SampleResult]) -> Counter[str]:
    """Count output rows by state."""
    return Counter(sample.state for sample in samples)


def _logprob_rows(logprobs: tuple[TokenLogprob, ...] | None) -> list[dict[str, Any]] | None:
    if logprobs is None:
        return None
    return [
        {
            "token_id": item.token_id,
            "logprob": item.logprob,
            "top": [{"token_id": token, "logprob": value} for token, value in item.top],
        }
        for item in logprobs
    ]
