"""Text input becomes Parquet, once, at planning; from then on workers only ever read Parquet.

Two passes: the first finds every column and its exact type, the second writes. Beside the file's own
columns there may be hidden ones, which are never copied to the output:

    __nightjar_line          the line a row starts on
    __nightjar_error         why a row cannot run (malformed, or half a character in what is used)
    __nightjar_json:NAME     the exact JSON of a column that prompts are made of, where Arrow would
                             add nulls or reorder keys

Half surrogate pairs and bytes that are not UTF-8 become U+FFFD in the columns, which are counted;
where a prompt would be made of them the row gets an error instead.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import BadInput
from storage.json_schema import JsonType
from storage.text_readers import TextRow, csv_header, read_csv, read_jsonl

HIDDEN = "__nightjar_"
LINE = "__nightjar_line"
ERROR = "__nightjar_error"
JSON_PREFIX = "__nightjar_json:"
MAX_COLUMNS = 10_000

_GROUP_BYTES = 4 * 1024 * 1024
_GROUP_ROWS = 8192
_SURROGATE = re.compile("[\ud800-\udfff]")
_INTEGER = re.compile(r"-?[1-9]\d{0,18}|0")
_NUMERIC = frozenset("-0123456789")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """A local text file and how its columns are used."""

    path: Path
    name: str
    """What messages call the file; its ending tells tabs from commas."""

    format: str
    """jsonl or csv."""

    used: frozenset[str] = frozenset()
    """Columns that prompts or parameters may be made of."""

    text: frozenset[str] = frozenset()
    """CSV columns that stay text whatever they look like."""

    skip_bad: bool = False
    """Turn malformed records into error rows instead of refusing the file."""

    def rows(self) -> Iterator[TextRow]:
        read = read_csv if self.format == "csv" else read_jsonl
        return read(self.path, name=self.name)


@dataclass(frozen=True, slots=True)
class Converted:
    """What became of a text file."""

    num_rows: int
    num_bad_rows: int
    num_replaced: int
    """Cells in which something that is not Unicode text became U+FFFD."""


def convert(source: TextSource, target: Path) -> Converted:
    """Write the file's rows to `target` as Parquet.

    Raises:
        BadInput: it is damaged, or (unless `skip_bad`) a record is malformed; names file and line.
    """
    columns = _infer(source)
    writer = _Writer(source, columns)
    with pq.ParquetWriter(
        target, writer.schema, compression="zstd", write_page_checksum=True
    ) as out:
        for rows in _groups(source.rows()):
            out.write_batch(writer.records(rows))
    return Converted(writer.num_rows, writer.num_bad_rows, writer.num_replaced)


def convert_arrow(path: Path, target: Path, *, name: str) -> Converted:
    """Write an Arrow IPC file or stream, such as a saved Hugging Face dataset has, as Parquet.

    Raises:
        BadInput: it is not Arrow, or is damaged.
    """
    num_rows = 0
    try:
        with pa.memory_map(str(path)) as file:
            batches = _arrow_batches(file)
            schema = next(batches)
            with pq.ParquetWriter(
                target, schema, compression="zstd", write_page_checksum=True
            ) as out:
                for batch in batches:
                    # Arrow trusts what it maps: offsets that lead nowhere would end the process.
                    batch.validate(full=True)
                    if not batch.num_columns and batch.num_rows:
                        # Parquet would forget how many rows there were.
                        raise ValueError(f"{batch.num_rows} rows without a column; leave it out")
                    num_rows += batch.num_rows
                    for start in range(0, batch.num_rows, _GROUP_ROWS):
                        out.write_batch(batch.slice(start, _GROUP_ROWS))
    except (
        pa.ArrowException,
        OSError,
        ValueError,
    ) as error:  # ValueError: a name that is not UTF-8
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{name}: not a readable Arrow file: {reason[:200]}") from None
    return Converted(num_rows, 0, 0)


def _arrow_batches(file: Any) -> Iterator[Any]:
    """Yield the schema, then every batch."""
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if not is_file:
        reader = pa.ipc.open_stream(file)
        yield reader.schema
        yield from reader
        return
    reader = pa.ipc.open_file(file)
    yield reader.schema
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


class _CsvType:
    """The type of a CSV column: int64 or float64 where every text is that number's own form."""

    __slots__ = ("has_values", "is_float", "is_integer")

    def __init__(self, *, is_text: bool) -> None:
        self.has_values = False
        self.is_integer = not is_text
        self.is_float = not is_text

    def observe(self, value: str) -> None:
        if not value:
            return
        self.has_values = True
        if self.is_integer:
            self.is_integer = (
                _INTEGER.fullmatch(value) is not None and -(2**63) <= int(value) < 2**63
            )
        if self.is_float:
            self.is_float = value[0] in _NUMERIC and _is_float(value)

    def arrow_type(self) -> pa.DataType:
        if not self.has_values:
            return pa.string()
        if self.is_integer:
            return pa.int64()
        return pa.float64() if self.is_float else pa.string()


def _is_float(value: str) -> bool:
    try:
        return repr(float(value)) == value
    except ValueError:
        return False


def _infer(source: TextSource) -> dict[str, pa.DataType | None]:
    """Return the columns in order of appearance with their types; None is JSON text."""
    columns: dict[str, Any] = {}
    if source.format == "csv":
        for name in csv_header(source.path, name=source.name):
            columns[_SURROGATE.sub("\ufffd", name)] = _CsvType(is_text=name in source.text)
    for row in source.rows():
        if row.values is None:
            if not source.skip_bad:
                raise BadInput(
                    f"{source.name}: {row.error}; mend it, or set input.on_bad_file to "
                    "skip_with_error_rows"
                )
            continue
        for name, value in row.values.items():
            column = columns.get(name)
            if column is None:
                column = columns[name] = _new_column(name, len(columns), row.line, source)
            column.observe(value)
    return {name: column.arrow_type() for name, column in columns.items()}


def _new_column(name: str, num_columns: int, line: int, source: TextSource) -> JsonType:
    if _SURROGATE.search(name) or "\0" in name or name.startswith(HIDDEN):
        raise BadInput(f"{source.name}: line {line}: {name!a} cannot be a column name")
    if num_columns >= MAX_COLUMNS:
        raise BadInput(f"{source.name}: line {line}: more than {MAX_COLUMNS} different keys")
    return JsonType()


class _Writer:
    """Builds record batches of the inferred schema."""

    def __init__(self, source: TextSource, columns: dict[str, pa.DataType | None]) -> None:
        self._source = source
        self._columns = columns
        is_json = source.format != "csv"
        # Exact JSON is kept for what prompts are made of, wherever Arrow could not give it back.
        self._raw = [
            name
            for name, kind in columns.items()
            if is_json and name in source.used and (kind is None or pa.types.is_nested(kind))
        ]
        fields = [pa.field(name, kind or pa.string()) for name, kind in columns.items()]
        fields += [pa.field(JSON_PREFIX + name, pa.string()) for name in self._raw]
        self.schema = pa.schema([*fields, pa.field(LINE, pa.int64()), pa.field(ERROR, pa.string())])
        self.num_rows = self.num_bad_rows = self.num_replaced = 0

    def records(self, rows: list[TextRow]) -> pa.RecordBatch:
        errors = [row.error for row in rows]
        values = [row.values or {} for row in rows]
        arrays = [self._column(name, kind, values, errors) for name, kind in self._columns.items()]
        for name in self._raw:
            texts = [json.dumps(row[name]) if row.get(name) is not None else None for row in values]
            arrays.append(pa.array(texts, pa.string()))
        arrays += [pa.array([row.line for row in rows], pa.int64()), pa.array(errors, pa.string())]
        self.num_rows += len(rows)
        self.num_bad_rows += sum(row.values is None for row in rows)
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _column(
        self, name: str, kind: pa.DataType | None, rows: list[dict[str, Any]], errors: list[Any]
    ) -> pa.Array:
        values = [row.get(name) for row in rows]
        if self._source.format == "csv" and kind is not None:
            values = _from_csv(values, kind)
        try:
            return pa.array(self._to_arrow(values, kind), kind or pa.string())
        except UnicodeEncodeError:
            cleaned = [clean(value) for value in values]
        for index, value in enumerate(values):
            if not _equal(value, cleaned[index]):
                self.num_replaced += 1
                if name in self._source.used and errors[index] is None:
                    errors[index] = (
                        f"column {name!r} is not valid text: half a surrogate pair or bytes that are not UTF-8"
                    )
        return pa.array(self._to_arrow(cleaned, kind), kind or pa.string())

    def _to_arrow(self, values: list[Any], kind: pa.DataType | None) -> list[Any]:
        if kind is not None:
            return values
        return [None if v is None else json.dumps(v, ensure_ascii=False) for v in values]


def _from_csv(values: list[Any], kind: pa.DataType) -> list[Any]:
    if pa.types.is_string(kind):
        return values
    parse: Callable[[str], Any] = int if pa.types.is_integer(kind) else float
    return [parse(value) if value else None for value in values]


def _equal(value: Any, cleaned: Any) -> bool:
    return bool(value is cleaned or value == cleaned or value != value)


def clean(value: Any) -> Any:
    """Replace what is not Unicode text by U+FFFD, at every depth."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return value


def _groups(rows: Iterable[TextRow]) -> Iterator[list[TextRow]]:
    """Cut rows into groups of a few MB, each of which becomes a row group."""
    group: list[TextRow] = []
    size = 0
    for row in rows:
        group.append(row)
        size += row.num_bytes
        if size >= _GROUP_BYTES or len(group) >= _GROUP_ROWS:
            yield group
            group, size = [], 0
    if group:
        yield group
