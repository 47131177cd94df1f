"""The first half of planning: which files, in Parquet form, with which columns."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from storage import formats
from storage.convert import HIDDEN
from storage.errors import BadInput
from storage.input_schema import FileSchema, decode_schema, unify
from storage.inputs import InputFiles, SourceFile
from storage.manifest import InputFile
from storage.object_store import ObjectStore
from tasks.ahead import ahead
from tasks.converted_inputs import fetch_converted, keep_converted
from tasks.feed_process import FeedProcess
from tasks.job import RunConfig
from tasks.prompt_columns import PromptColumns, candidate_columns, choose_columns, text_columns

OPENAI = "openai-batch"


@dataclass(frozen=True, slots=True)
class LocalInput:
    """One input file and the Parquet file that is read for it."""

    file: InputFile
    path: Path
    schema: pa.Schema


@dataclass(frozen=True, slots=True)
class PlannedInput:
    """All input files, their common schema and what prompts are made of."""

    files: list[LocalInput]
    schema: pa.Schema
    columns: PromptColumns
    warnings: list[str]


def plan_inputs(
    job: RunConfig, files: InputFiles, process: FeedProcess, store: ObjectStore, work_dir: Path
) -> PlannedInput:
    """Expand, convert and describe the input.

    Raises:
        BadInput: a file is unreadable (unless error rows are asked for), files disagree, or the
            columns do not make a prompt.
    """
    planner = _Planner(job, process, store, work_dir)
    found: list[LocalInput] = []
    row_start = 0
    sources = files.expand(job.input.uri)
    fetched = ahead(sources, lambda source: files.fetch(source.uri, source.etag))
    for index, (source, fetch) in enumerate(fetched):
        local = planner.describe(index, source, fetch, row_start)
        found.append(local)
        row_start += local.file.num_rows
    kinds = {local.file.format for local in found if local.file.num_rows and not local.file.error}
    if OPENAI in kinds and len(kinds) > 1:
        odd = next(local.file for local in found if local.file.format != OPENAI)
        raise BadInput(f"{odd.uri}: is {odd.format} beside OpenAI batches; run them apart")
    schema = unify([FileSchema(local.file.uri, local.schema) for local in found])
    columns = _columns(job, found, schema, is_openai=OPENAI in kinds)
    return PlannedInput(found, schema, columns, planner.warnings + _notes(job, columns, schema))


class _Planner:
    """Describes files one by one."""

    def __init__(
        self,
        job: RunConfig,
        process: FeedProcess,
        store: ObjectStore,
        work_dir: Path,
    ) -> None:
        self._job = job
        self._process = process
        self._store = store
        self._work_dir = work_dir
        self.warnings: list[str] = []

    def describe(
        self, index: int, source: SourceFile, fetch: Callable[[], Path], row_start: int
    ) -> LocalInput:
        try:
            return self._describe(index, source, fetch(), row_start)
        except BadInput as error:
            if self._job.input.on_bad_file == "fail":
                raise
            # How many rows it had is unknown: one error row stands for the file.
            self.warnings.append(f"{source.uri}: unreadable, one error row stands for it")
            file = self._file(source, "unreadable", 1, row_start)
            return LocalInput(
                dataclasses.replace(file, error=str(error)), Path(source.uri), pa.schema([])
            )

    def _describe(self, index: int, source: SourceFile, path: Path, row_start: int) -> LocalInput:
        kind = formats.detect(path, name=source.uri, asked=self._job.input.format)
        read_key = read_etag = None
        if kind != "parquet":
            read_key, read_etag = self._convert(index, source, path, kind)
            probe = InputFile(
                uri=source.uri,
                size=source.size,
                etag=source.etag,
                format=kind,
                num_rows=0,
                row_start=0,
                read_key=read_key,
                read_etag=read_etag,
            )
            path = fetch_converted(probe, self._store, self._work_dir)
        told = self._process.ask_file({"op": "schema", "path": str(path), "name": source.uri})
        file = self._file(source, kind, told["num_rows"], row_start)
        file = dataclasses.replace(file, read_key=read_key, read_etag=read_etag)
        return LocalInput(file, path, decode_schema(told["schema"]))

    def _convert(self, index: int, source: SourceFile, path: Path, kind: str) -> tuple[str, str]:
        target = self._work_dir / f"converting-{index}.parquet"
        told = self._process.ask_file(
            {
                "op": "convert",
                "path": str(path),
                "name": source.uri,
                "target": str(target),
                "kind": kind,
                "used": sorted(candidate_columns(self._job)),
                "text": sorted(text_columns(self._job.input)),
            }
        )
        if told["num_replaced"]:
            self.warnings.append(
                f"{source.uri}: {told['num_replaced']} values held half a surrogate pair or bytes "
                "that are not UTF-8, which became U+FFFD"
            )
        return keep_converted(target, index, self._store, self._work_dir)

    def _file(self, source: SourceFile, kind: str, num_rows: int, row_start: int) -> InputFile:
        return InputFile(
            uri=source.uri,
            size=source.size,
            etag=source.etag,
            format=kind,
            num_rows=num_rows,
            row_start=row_start,
        )


def _columns(
    job: RunConfig, found: list[LocalInput], schema: pa.Schema, *, is_openai: bool
) -> PromptColumns:
    """Settle the prompt's columns over the common schema, then check each file for them."""
    readable = [local for local in found if local.file.num_rows and not local.file.error]
    types = {field.name: field.type for field in schema}
    where = found[0].file.uri if len(found) == 1 else f"the {len(found)} input files"
    if not readable:
        # No row, no fault: an empty night must not fail because it has no columns.
        return PromptColumns("text", "prompt", None, None, None, ())
    columns = choose_columns(job, types, is_openai=is_openai, where=where)
    for local in readable:
        missing = [name for name in columns.required if name not in local.schema.names]
        if missing:
            own = ", ".join(n for n in local.schema.names if not n.startswith(HIDDEN)) or "none"
            raise BadInput(
                f"{local.file.uri}: no column {missing[0]!r}, which the prompt needs; it has: {own}"
            )
    return columns


def _notes(job: RunConfig, columns: PromptColumns, schema: pa.Schema) -> list[str]:
    """Say what was decided on the user's behalf."""
    notes = []
    if columns.sampling:
        notes.append(
            f"columns {', '.join(columns.sampling)} set sampling per row; "
            "set sampling_columns to [] if they do not mean that"
        )
    if "chat_template_kwargs" in schema.names and "chat_template_kwargs" not in columns.used:
        notes.append(
            "column chat_template_kwargs is copied but not used; set input.chat_template_kwargs"
        )
    return notes
