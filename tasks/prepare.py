"""RowPreparer: a batch of input rows becomes prompts, inside the feed's child process.

Rows never fail together: whatever is wrong with one is its own state and error.
"""

import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from inference.chat_template import RowLimit
from inference.errors import PromptError
from inference.openai_batch import read_request
from inference.prompt import PromptBuilder
from inference.prompt_template import decode
from inference.row_sampling import row_overrides, row_sampling
from inference.sampling import SamplingParams
from storage.convert import ERROR, JSON_PREFIX
from tasks.feed_spec import too_many_hard_rows
from tasks.frames import ENCODING, RENDERING, Recorder
from tasks.prompt_columns import PromptColumns

INVALID = "invalid_input"


@dataclass(slots=True)
class Row:
    """One row on its way to tokens."""

    index: int  # global
    values: dict[str, Any]
    key: int | str
    state: str | None = None
    error: str | None = None
    text: str | None = None
    token_ids: list[int] = field(default_factory=list)
    num_tokens: int | None = None
    is_thinking: bool = False
    is_truncated: bool = False
    is_hard: bool = False  # ran into a limit
    overrides: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 0

    def refuse(self, error: PromptError) -> None:
        self.state, self.error, self.token_ids = error.state, str(error), []


class RowPreparer:
    """Turns batches into rows. `recorder` is told each row before anything can go wrong with it.

    Rows that run into a limit are reported as they happen; too many of them end the run.
    """

    def __init__(
        self,
        columns: PromptColumns,
        builder: PromptBuilder,
        sampling: SamplingParams,
        *,
        recorder: Recorder,
        row_cpu_s: float,
        max_hard_rows: int,
        on_hard_row: Callable[[], None],
    ) -> None:
        self._columns = columns
        self._builder = builder
        self._sampling = sampling
        self._recorder = recorder
        self._row_cpu_s = row_cpu_s
        self._max_hard_rows = max_hard_rows
        self._on_hard_row = on_hard_row
        self._num_hard = 0
        signal.signal(signal.SIGVTALRM, _raise_limit)

    def prepare(
        self,
        records: pa.RecordBatch,
        bad_text: Mapping[str, list[int]],
        *,
        row_start: int,
        poison: Mapping[int, str],
        careful: bool,
    ) -> list[Row]:
        """Return every row of the batch, prompts tokenised.

        `poison` holds rows that are known to kill, with what is said of them; `careful` encodes row
        by row, so that the recorder names the one that kills.
        """
        rows = self._rows(records, bad_text, row_start)
        for row in rows:
            if row.index in poison:
                row.refuse(PromptError(INVALID, poison[row.index]))
            elif row.state is None:
                self._recorder.write(RENDERING, row.index, row.index + 1)
                self._render(row)
                if row.is_hard:
                    self._note_hard_row()
        live = [row for row in rows if row.text is not None and row.state is None]
        step = 1 if careful else max(1, len(live))
        for first in range(0, len(live), step):
            self._encode(live[first : first + step])
        return rows

    def _rows(
        self, records: pa.RecordBatch, bad_text: Mapping[str, list[int]], row_start: int
    ) -> list[Row]:
        values = {name: cells(records, name) for name in sorted(self._columns.used)}
        errors = cells(records, ERROR)
        rows = []
        for index in range(records.num_rows):
            row_values = {name: column[index] for name, column in values.items()}
            key = _key(row_values.get(self._columns.id or ""), row_start + index)
            row = Row(row_start + index, row_values, key)
            if errors[index] is not None:
                row.refuse(PromptError(INVALID, errors[index]))
            rows.append(row)
        for name in sorted(self._columns.used & bad_text.keys()):
            for index in bad_text[name]:
                rows[index].refuse(PromptError(INVALID, f"column {name!r} is not UTF-8"))
        return rows

    def _render(self, row: Row) -> None:
        try:
            with _processor_limit(self._row_cpu_s):
                row.text = self._text(row)
        except PromptError as error:
            row.refuse(error)
            row.is_hard = "out of memory" in str(error)
        except MemoryError:
            row.refuse(PromptError(INVALID, "the prompt needs more memory than a row may use"))
            row.is_hard = True
        except RowLimit:
            message = f"the chat template took more than {self._row_cpu_s:g} s for this row"
            row.refuse(PromptError(INVALID, message))
            row.is_hard = True

    def _note_hard_row(self) -> None:
        self._num_hard += 1
        self._on_hard_row()
        if self._num_hard > self._max_hard_rows:
            raise too_many_hard_rows(self._max_hard_rows)

    def _text(self, row: Row) -> str:
        columns, values = self._columns, row.values
        overrides = {name: values[name] for name in columns.sampling}
        request = None
        if columns.kind == "openai":
            request = read_request(values["url"], values["body"], self._sampling)
            overrides |= request.overrides
        row.overrides = row_overrides(overrides)
        row.max_tokens = row_sampling(self._sampling, row.overrides).max_tokens
        if request is not None and request.prompt is not None:
            return self._builder.render_text(request.prompt, column="body.prompt")
        if request is not None:
            return self._builder.render_messages(
                request.messages, request.tools, column="body.messages", tools_column="body.tools"
            )
        if columns.template is not None:
            return self._builder.render_text(columns.template.render(values))
        name = str(columns.prompt)
        value = values[name]
        if columns.kind == "messages":
            tools = values[columns.tools] if columns.tools else None
            return self._builder.render_messages(
                value, tools, column=name, tools_column=str(columns.tools)
            )
        value = decode(name, value) if isinstance(value, bytes) else value
        return self._builder.render_text(value, column=name)

    def _encode(self, rows: list[Row]) -> None:
        self._recorder.write(ENCODING, rows[0].index, rows[-1].index + 1)
        texts = [row.text or "" for row in rows]
        for row, token_ids in zip(rows, self._builder.encode(texts), strict=True):
            row.num_tokens = len(token_ids)
            try:
                prompt = self._builder.finish(row.text or "", token_ids, max_tokens=row.max_tokens)
            except PromptError as error:
                row.refuse(error)
            else:
                row.token_ids, row.is_thinking = prompt.token_ids, prompt.is_thinking
                row.num_tokens = len(prompt.token_ids)
                row.is_truncated = prompt.is_truncated
            row.text = None


def cells(records: pa.RecordBatch, name: str) -> list[Any]:
    """Return a column as Python values, by its exact JSON where there is one; nulls where it lacks."""
    raw = records.schema.get_field_index(JSON_PREFIX + name)
    if raw >= 0:
        texts = records.column(raw).to_pylist()
        return [None if text is None else json.loads(text) for text in texts]
    index = records.schema.get_field_index(name)
    if index < 0:
        return [None] * records.num_rows
    array: Any = records.column(index)
    try:
        return list(array.to_pylist())
    except (ValueError, OverflowError):  # a timestamp that Python has no value for
        return [_cell(array, row) for row in range(len(array))]


def _cell(array: Any, row: int) -> Any:
    try:
        return array[row].as_py()
    except (ValueError, OverflowError):
        return str(array.slice(row, 1).cast(pa.string())[0])


def _key(value: Any, row_index: int) -> int | str:
    if value is None:
        return row_index
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return value if isinstance(value, str) else str(value)


def _raise_limit(*_: object) -> None:
    raise RowLimit("it takes too long")


@contextmanager
def _processor_limit(seconds: float) -> Iterator[None]:
    """Raise RowLimit after this much processor time; waiting for a busy machine does not count."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
