"""PromptFeed: rows of a plan, ready for the engine, in order, one batch ahead.

Everything hostile (files, templates, prompts) is handled in a child process with limits; this side
only receives token ids and Arrow batches.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.input_schema import decode_schema
from storage.inputs import InputFiles
from storage.manifest import InputFile, PlanManifest
from storage.object_store import ObjectStore
from tasks.ahead import ahead
from tasks.converted_inputs import fetch_converted
from tasks.feed_batches import PreparedBatch, PreparedRow, error_batch, from_rows
from tasks.feed_process import FeedProcess
from tasks.feed_spec import FeedLimits
from tasks.job import RunConfig
from tasks.prompt_columns import PromptColumns

__all__ = ["FeedLimits", "PreparedBatch", "PreparedRow", "PromptFeed", "input_schema"]

_ERROR_ROWS = 1024


def input_schema(plan: PlanManifest) -> pa.Schema:
    """Return the schema of the input columns that are copied through, under their final names."""
    return decode_schema(plan.input_schema)


class PromptFeed:
    """Reads rows of a plan. One `read` at a time; giving up its iterator is fine.

    Each input file is checked against its planned ETag once per feed, before its first row.
    """

    def __init__(
        self,
        *,
        job: RunConfig,
        model_dir: Path,
        store: ObjectStore,
        work_dir: Path,
        max_model_len: int,
        limits: FeedLimits | None = None,
        files: InputFiles | None = None,
        process: FeedProcess | None = None,
    ) -> None:
        """Make a feed; nothing is started or read yet. `store` is the run folder.

        A `process` that planned this very job can be handed on, warm; its owner closes it.
        """
        self._job = job
        self._store = store
        self._work_dir = work_dir
        self._files = files or InputFiles(work_dir, job.storage)
        self._owns_process = process is None
        self._process = process or FeedProcess.of(
            job, model_dir=model_dir, max_model_len=max_model_len, limits=limits
        )
        self._process.begin_pass()
        self._run_sampling = job.sampling.params()
        self._paths: dict[str, Path] = {}

    def __enter__(self) -> "PromptFeed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child process, unless it was handed in; safe to repeat."""
        if self._owns_process:
            self._process.close()

    @property
    def warnings(self) -> list[str]:
        """What is odd about the chat template, once the first row has been read; no prompt text."""
        return self._process.warnings

    def read(self, plan: PlanManifest, row_start: int, row_end: int) -> Iterator[PreparedBatch]:
        """Yield rows [row_start, row_end) of the plan, in order and without gaps.

        Raises:
            InputChanged: a file is not the planned one.
            BadInput, CorruptObject: a file cannot be read after all.
            ModelError, EngineConfigError: the model folder or the chat template is wrong.
        """
        if not 0 <= row_start <= row_end <= plan.num_rows:
            raise ValueError(
                f"rows [{row_start}, {row_end}) are not in the plan's {plan.num_rows} rows"
            )
        wanted = (
            file
            for file in plan.inputs
            if max(row_start, file.row_start) < min(row_end, file.row_start + file.num_rows)
        )
        for file, path in ahead(wanted, self._path):
            first = max(row_start, file.row_start)
            end = min(row_end, file.row_start + file.num_rows)
            yield from self._read_file(plan, file, path, first, end)

    def show(self, plan: PlanManifest, *, num_samples: int, num_rows: int) -> dict[str, Any]:
        """Return the first rows and the first prompt, for the eye.

        `schema` lists the copied-through columns; `samples` the first rows as clipped text; `prompt`
        is what the model is given for `row`, or null when none of the first `num_rows` can run.
        Raises as `read` does.
        """
        schema = [{"name": f.name, "type": str(f.type)} for f in input_schema(plan)]
        shown: dict[str, Any] = {"schema": schema, "samples": [], "prompt": None, "row": None}
        for file in plan.inputs:
            if file.error is not None or not file.num_rows:
                continue
            path = self._path(file)
            self._process.load(PromptColumns.from_json(plan.prompt_columns, self._job.input.prompt))
            request = {"op": "show", "path": str(path), "name": file.uri, "first": file.row_start}
            limits = {"num_samples": num_samples, "num_rows": num_rows}
            told = self._process.ask_file({**request, **limits, "schema": plan.input_schema})
            return shown | {name: told[name] for name in ("samples", "prompt", "row")}
        return shown

    def _read_file(
        self,
        plan: PlanManifest,
        file: InputFile,
        fetch: Callable[[], Path],
        first: int,
        end: int,
    ) -> Iterator[PreparedBatch]:
        if file.error is not None:
            schema = input_schema(plan)
            for row in range(first, end, _ERROR_ROWS):
                count = min(_ERROR_ROWS, end - row)
                yield error_batch(row, count, schema, self._run_sampling, file.error)
            return
        path = fetch()
        self._process.load(PromptColumns.from_json(plan.prompt_columns, self._job.input.prompt))
        request = {
            "op": "prepare",
            "path": str(path),
            "name": file.uri,
            "first": file.row_start,
            "row_start": first,
            "row_end": end,
            "schema": plan.input_schema,
            "mode": "rows",
        }
        for frame in self._process.prepare(request):
            batch = from_rows(frame.payload, frame.header["row_start"], self._run_sampling)
            took = {name: frame.header[name] for name in ("read_s", "tokenise_s")}
            yield dataclasses.replace(batch, **took)

    def _path(self, file: InputFile) -> Path:
        """Return the Parquet file to read, after checking once that the input is the planned one."""
        if file.error is not None:
            return Path(file.uri)  # nothing of it is read
        if file.uri not in self._paths:
            if file.read_key is None:
                self._paths[file.uri] = self._files.fetch(file.uri, file.etag)
            else:
                self._files.check(file.uri, file.etag)
                self._paths[file.uri] = fetch_converted(file, self._store, self._work_dir)
        return self._paths[file.uri]
