"""The child a feed reads hostile input in: `python -m tasks.feed_child RECORDER`.

Reads Parquet, converts text input, renders and tokenises, under a limit on its address space and on
the processor time of a row. Speaks frames on its standard input and output, and ends when the input
does. It opens no network connection and writes nothing but the conversion it is asked for.
"""

import base64
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from inference.chat_template import RowLimit
from inference.errors import InferenceError
from inference.prompt import PromptBuilder
from storage.convert import LINE, TextSource, convert, convert_arrow
from storage.errors import StorageError
from storage.input_schema import conform, decode_schema
from storage.parquet_reader import ParquetInput, RowBatch
from storage.text_repair import repair_text
from tasks.feed_batches import Counter, to_counts, to_rows
from tasks.feed_imports import folders_read_once, forget_pandas, torch_hidden
from tasks.feed_spec import FeedSpec
from tasks.frames import IDLE, READING, Recorder, read_frame, write_frame
from tasks.prepare import RowPreparer, cells
from tasks.prompt_columns import PromptColumns

_SHOWN_CHARS = 300
_LOAD_BYTES = 2 << 30
"""Address space that importing transformers and loading a tokenizer may take."""


class Child:
    """Answers requests one after the other."""

    def __init__(self, recorder: Recorder, reply: Callable[..., None]) -> None:
        self._recorder = recorder
        self._reply = reply
        self._counter = Counter()

    def handle(self, request: dict[str, Any]) -> None:
        """Answer one request by frames, the last of which is `done` or `error`."""
        try:
            getattr(self, "do_" + request.pop("op"))(**request)
        except (StorageError, InferenceError) as error:
            self._reply({"kind": "error", "type": type(error).__name__, "message": str(error)})
        except MemoryError:
            message = "reading the input needs more memory than the feed may use"
            self._reply({"kind": "error", "type": "BadInput", "message": message})
        else:
            self._reply({"kind": "done"})
        # Whatever else is raised, such as a panic of the tokenizer, ends this process: the recorder then
        # has to go on telling at which row.
        self._recorder.write(IDLE)

    def do_configure(self, spec: dict[str, Any]) -> None:
        self._spec = FeedSpec(**spec)
        self._job = self._spec.job()
        limit_memory(self._spec.memory_bytes)

    def do_load(self, columns: dict[str, Any]) -> None:
        """Load the tokenizer. The memory limit counts from here on."""
        # Not lifted altogether: compiling a template folds its constants, and those can be huge.
        limit_memory(max(_LOAD_BYTES, self._spec.memory_bytes))
        chosen = PromptColumns.from_json(columns, self._job.input.prompt)
        config = self._spec.prompt_config(has_messages=chosen.kind == "messages")
        with torch_hidden(), folders_read_once():
            builder = PromptBuilder(Path(self._spec.model_dir), config)
        builder.encode(["warm", "up"])  # the tokenizer's threads start now, outside the limit
        limit_memory(self._spec.memory_bytes)
        self._sources = {new: old for old, new in self._job.output.rename.items()}
        self._has_id = chosen.id is not None
        self._builder = builder
        self._sampling = self._job.sampling.params()
        self._preparer = RowPreparer(
            chosen,
            builder,
            self._sampling,
            recorder=self._recorder,
            row_cpu_s=self._spec.row_cpu_s,
            max_hard_rows=self._spec.max_hard_rows,
            on_hard_row=lambda: self._reply({"kind": "progress"}),
        )
        self._reply({"kind": "loaded", "warnings": builder.warnings})

    def do_schema(self, path: str, name: str) -> None:
        self._recorder.write(READING)
        file = ParquetInput(Path(path), name=name)
        schema = base64.b64encode(file.schema.serialize().to_pybytes()).decode()
        self._reply({"kind": "schema", "schema": schema, "num_rows": file.num_rows})
        file.close()

    def do_locate(self, path: str, name: str, row: int, column: str) -> None:
        """Send one row's id, and its line where the file was text."""
        self._recorder.write(READING)
        file = ParquetInput(Path(path), name=name)
        (batch,) = self._limited(file.batches(row, row + 1, [column, LINE]))
        (value,), (line,) = cells(batch.records, column), cells(batch.records, LINE)
        self._reply({"kind": "located", "value": str(value), "line": line})
        file.close()

    def do_show(
        self, path: str, name: str, first: int, num_samples: int, num_rows: int, schema: str
    ) -> None:
        """Send the first rows as clipped text, and the first prompt among `num_rows` as the model sees it."""
        self._recorder.write(READING, first)
        file = ParquetInput(Path(path), name=name)
        output = decode_schema(schema)
        samples: list[dict[str, str]] = []
        found: dict[str, Any] = {"prompt": None, "row": None}
        for batch in self._limited(file.batches(0, min(num_rows, file.num_rows))):
            records, bad_text = repair_text(batch.records)
            start = first + batch.row_start
            rows = self._preparer.prepare(
                records, bad_text, row_start=start, poison={}, careful=True
            )
            columns = conform(records, output, self._sources, name=name)
            wanted = columns.slice(0, max(0, num_samples - len(samples)))
            values = {column: cells(wanted, column) for column in wanted.schema.names}
            for index in range(wanted.num_rows):
                samples.append({column: _clipped(cell[index]) for column, cell in values.items()})
            runnable = next((row for row in rows if row.state is None), None)
            if runnable is not None:
                text = self._builder.decode(runnable.token_ids)
                found = {"prompt": text, "row": runnable.index}
                break
        self._reply({"kind": "shown", "samples": samples, **found})
        file.close()

    def do_convert(
        self, path: str, name: str, target: str, kind: str, used: list[str], text: list[str]
    ) -> None:
        self._recorder.write(READING)
        if kind == "arrow":
            done = convert_arrow(Path(path), Path(target), name=name)
        else:
            source = TextSource(
                path=Path(path),
                name=name,
                format="csv" if kind == "csv" else "jsonl",
                used=frozenset(used),
                text=frozenset(text),
                skip_bad=self._job.input.on_bad_file == "skip_with_error_rows",
            )
            done = convert(source, Path(target))
        self._reply({"kind": "converted", "num_replaced": done.num_replaced})

    def do_prepare(
        self,
        path: str,
        name: str,
        first: int,
        row_start: int,
        row_end: int,
        poison: dict[str, str],
        careful_until: int,
        schema: str,
        mode: str,
    ) -> None:
        """Send rows [row_start, row_end) of the run, which are this file's from `first` on."""
        known = {int(row): message for row, message in poison.items()}
        output = decode_schema(schema)
        self._recorder.write(READING, row_start)
        file = ParquetInput(Path(path), name=name)
        started = time.perf_counter()
        for batch in self._limited(file.batches(row_start - first, row_end - first)):
            records, bad_text = repair_text(batch.records)
            start = first + batch.row_start
            has_read = time.perf_counter()
            rows = self._preparer.prepare(
                records, bad_text, row_start=start, poison=known, careful=start < careful_until
            )
            prepared = time.perf_counter()
            header = {
                "kind": "batch",
                "row_start": start,
                "num_rows": len(rows),
                "num_hard": sum(row.is_hard for row in rows),
                "num_replaced": sum(map(len, bad_text.values())),
                "read_s": has_read - started,
                "tokenise_s": prepared - has_read,
            }
            if mode == "count":
                conform(records, output, self._sources, name=name)
                payload = to_counts(rows, self._counter, has_id=self._has_id, run=self._sampling)
            else:
                payload = to_rows(rows, conform(records, output, self._sources, name=name))
            self._reply(header, payload)
            self._recorder.write(READING, start + len(rows))
            started = time.perf_counter()
        file.close()

    def _limited(self, batches: Iterator[RowBatch]) -> Iterator[RowBatch]:
        """Yield the batches, each read under the limit for reading; what is done with it has more."""
        while True:
            usual = resource.getrlimit(resource.RLIMIT_AS)
            limit_memory(self._spec.read_bytes, at_most=usual[0])
            try:
                batch = next(batches, None)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, usual)
            if batch is None:
                return
            yield batch


def _clipped(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "replace").decode()
    return (
        text
        if len(text) <= _SHOWN_CHARS
        else f"{text[:_SHOWN_CHARS]}... ({len(text):,} characters)"
    )


def limit_memory(above_now: int, *, at_most: int = resource.RLIM_INFINITY) -> None:
    """Bound the address space to what it is now and this many bytes more (on Linux)."""
    if sys.platform != "linux":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft = pages * resource.getpagesize() + above_now
    known = [limit for limit in (soft, hard, at_most) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))


def _end_with_parent(descriptor: int) -> None:
    """Leave at once when the parent is gone, even in the middle of a request."""
    poller = select.poll()
    poller.register(descriptor, select.POLLHUP)
    while not any(event & (select.POLLHUP | select.POLLERR) for _, event in poller.poll()):
        pass
    os._exit(0)


def main() -> None:
    """Serve the parent until it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    forget_pandas()
    recorder = Recorder(int(sys.argv[1]))
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not look like a frame
    threading.Thread(target=_end_with_parent, args=(requests,), daemon=True).start()
    pa.set_cpu_count(1)
    child = Child(recorder, lambda header, payload=b"": write_frame(replies, header, payload))
    try:
        while (frame := read_frame(requests)) is not None:
            child.handle(frame.header)
    except (BrokenPipeError, RowLimit):
        os._exit(1)


if __name__ == "__main__":
    main()
