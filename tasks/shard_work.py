"""One attempt at one shard: rows in, sequences out, completions back, one Parquet part.

    read (feed thread) -> sequences -> accept ... accept -> is_complete -> write

Input columns are spilled to a local file while reading and streamed back while writing, so only
token ids, outcomes and completions of a shard are ever in memory.
"""

import shutil
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from inference.sampling import SamplingParams, draw_seed
from inference.sequence import Completion, Sequence
from storage import records
from storage.answers import ANSWERS, WrittenAnswers
from storage.local_errors import translate
from storage.manifest import Shard
from storage.shard_writer import PartWriter, WrittenPart
from tasks.base_part import BasePart
from tasks.feed import PreparedBatch, PreparedRow
from tasks.lengths import bucket, merged
from tasks.repetition import is_repetitive
from tasks.results import (
    ResultColumns,
    RowOutcome,
    SampleKey,
    SampleResult,
    sample_result,
    unrun_sample,
)
from tasks.shard_answers import ShardAnswers
from tasks.spill import Spill

_PREFIX_TOKENS = 32  # rows whose prompts agree this far are started together
_WRITE_ROWS = 1024


class Written(NamedTuple):
    """A part and what it holds."""

    part: WrittenPart
    states: Counter[str]
    tokens: Counter[str]
    """See `tasks.receipt.ShardFacts`."""

    lengths: dict[str, int]
    """Answered samples by completion tokens; see `tasks.lengths.bucket`."""

    answers: WrittenAnswers


class _Runnable(NamedTuple):
    offset: int
    token_ids: "array[int]"  # array.array is not subscriptable before Python 3.12
    sampling: SamplingParams
    row_key: int | str


@dataclass(slots=True)
class ShardWork:
    """State of one attempt. Driven by one thread; `read` may run in another before the rest."""

    shard: Shard
    attempt: int
    folder: Path
    """A local folder of this attempt's own."""

    columns: ResultColumns
    input_schema: Any
    """Arrow schema of the copied-through columns."""

    num_samples: int
    answers: ShardAnswers
    """Of every output row, by digest."""

    base: BasePart | None = None
    """What a retry starts from: its answered rows are kept, its failed ones redone."""

    kept: Mapping[tuple[int, int], SampleResult] = field(default_factory=dict)
    """Answers that are there already, by row and sample; not generated again."""

    rows: list[RowOutcome] = field(default_factory=list)
    results: dict[SampleKey, SampleResult] = field(default_factory=dict)
    started_at: float = 0.0
    read_s: float = 0.0
    tokenise_s: float = 0.0
    write_s: float = 0.0
    num_repetitive: int = 0
    num_sequences: int = 0
    _fed_s: float = 0.0
    _runnable: list[_Runnable] = field(default_factory=list)
    _num_open: int = 0
    _written: "Written | None" = None

    def read(self, batches: Iterable[PreparedBatch]) -> None:
        """Take the shard's rows from the feed and spill their columns."""
        with self._spill.writing() as write:
            for batch in batches:
                write(batch.columns)
                self._fed_s += batch.read_s + batch.tokenise_s
                self.tokenise_s += batch.tokenise_s
                for row in batch.rows:
                    self._take(row)
        if len(self.rows) != self.shard.num_rows:
            raise AssertionError(
                f"shard {self.shard.shard_id}: read {len(self.rows)} rows, planned {self.shard.num_rows}"
            )
        if self.base is None:
            self._reuse()

    def sequences(self, next_id: Callable[[SampleKey], int]) -> list[Sequence]:
        """Return what the engine must run, neighbours by shared prefix, longest first."""
        groups = Counter(_prefix(row) for row in self._runnable)
        order = sorted(
            self._runnable,
            key=lambda row: (-groups[_prefix(row)], _prefix(row), -len(row.token_ids)),
        )
        found = [
            Sequence(
                seq_id=next_id(key),
                prompt_token_ids=row.token_ids,
                sampling=row.sampling,
                draw_seed=draw_seed(row.sampling.seed, row.row_key, key.sample_index),
            )
            for row in order
            for key in self._keys(row.offset)
            if key not in self.results and (self.base is None or key in self.base.failed)
        ]
        self.num_sequences = self._num_open = len(found)
        self._runnable = []
        return found

    def accept(self, key: SampleKey, completion: Completion) -> SampleResult:
        """Take one finished sequence."""
        result = sample_result(self.rows[key.offset], key.sample_index, completion)
        # A tuple of Python integers takes ten times the memory of its text.
        wanted = self.columns.token_ids and result.token_ids is not None
        packed = array("i", result.token_ids or ()) if wanted else None
        self.results[key] = result._replace(token_ids=packed)
        self.num_repetitive += is_repetitive(completion.token_ids)
        self._num_open -= 1
        return result

    @property
    def is_complete(self) -> bool:
        """Whether every sequence has come back."""
        return self._num_open == 0 and not self._runnable

    @property
    def settled(self) -> list[SampleResult]:
        """Once read: results that need no engine, of bad rows and of answers that were kept."""
        return list(self.results.values())

    @property
    def tokenise_share(self) -> float:
        """Of the time rows took so far, what went into rendering and tokenising them."""
        return self.tokenise_s / self._fed_s if self._fed_s > 0 else 0.0

    def write(self) -> Written:
        """Write the part in input order, once; return it with what it holds."""
        if self._written is None:
            started = time.monotonic()
            self._written = self._write()
            self.write_s = time.monotonic() - started
        return self._written

    def _write(self) -> Written:
        path = self.folder / "completions.parquet"
        states: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        lengths: Counter[str] = Counter()
        is_ok: list[bool] = []
        # The part holds what was spilled and the completions: so much, or little more.
        num_bytes = self._spill.num_bytes
        with (
            translate(path, num_bytes),
            PartWriter(path, self.columns.schema(self.input_schema)) as writer,
        ):
            for batch in self._output_batches():
                writer.write(batch)
                found = batch.column("state").to_pylist()
                states.update(found)
                is_ok += [state == records.OK for state in found]
                _count_tokens(batch, tokens, lengths)
            part = writer.finish()
            answers = self.answers.write(self.folder / ANSWERS, is_ok)
        wanted = self.shard.num_rows * self.num_samples
        if part.num_rows != wanted:
            raise AssertionError(
                f"shard {self.shard.shard_id}: wrote {part.num_rows} rows, planned {wanted}"
            )
        return Written(part, states, tokens, merged([lengths]), answers)

    def discard(self) -> None:
        """Remove the attempt's local files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keys(self, offset: int) -> list[SampleKey]:
        return [SampleKey(offset, sample) for sample in range(self.num_samples)]

    def _take(self, row: PreparedRow) -> None:
        offset = len(self.rows)
        outcome = RowOutcome(
            row.row_index, row.num_prompt_tokens, row.is_thinking, row.state, row.error
        )
        self.rows.append(outcome)
        self.answers.add(row)
        if row.state is None:
            tokens = array("i", row.token_ids)
            self._runnable.append(_Runnable(offset, tokens, row.sampling, row.row_key))
            for key in self._keys(offset) if self.base is None else ():
                known = self.kept.get((row.row_index, key.sample_index))
                if known is not None:
                    self.results[key] = known
            return
        for key in self._keys(offset):
            self.results[key] = unrun_sample(outcome, key.sample_index)

    def _reuse(self) -> None:
        """Take over what an earlier run has answered."""
        missing = (
            row.offset * self.num_samples + key.sample_index
            for row in self._runnable
            for key in self._keys(row.offset)
            if key not in self.results
        )
        for place, found in self.answers.fetch(missing):
            key = SampleKey(*divmod(place, self.num_samples))
            row_index = self.rows[key.offset].row_index
            self.results[key] = found._replace(row_index=row_index, sample_index=key.sample_index)

    @property
    def _spill(self) -> Spill:
        return Spill(self.folder / "columns.arrow", self.input_schema)

    def _output_batches(self) -> Iterator[Any]:
        if self.base is None:
            return self._fresh_batches()
        return self.base.with_results(self.results, self.columns, self.input_schema, self.attempt)

    def _fresh_batches(self) -> Iterator[Any]:
        offset = 0
        for whole in self._spill.read(num_rows=len(self.rows)):
            for start in range(0, whole.num_rows, _WRITE_ROWS):
                batch = whole.slice(start, _WRITE_ROWS)
                keys = [key for i in range(batch.num_rows) for key in self._keys(offset + i)]
                offset += batch.num_rows
                yield self._with_results(batch, [self.results[key] for key in keys])

    def _with_results(self, batch: Any, samples: list[SampleResult]) -> Any:
        if self.num_samples > 1:
            repeat = [i for i in range(batch.num_rows) for _ in range(self.num_samples)]
            batch = batch.take(pa.array(repeat, pa.int64()))
        arrays = [*batch.columns, *self.columns.arrays(samples, self.attempt)]
        return pa.RecordBatch.from_arrays(arrays, schema=self.columns.schema(self.input_schema))


def _prefix(row: _Runnable) -> bytes:
    return row.token_ids[:_PREFIX_TOKENS].tobytes()


def _count_tokens(batch: Any, tokens: Counter[str], lengths: Counter[str]) -> None:
    columns = ("sample_index", "state", "num_prompt_tokens", "num_completion_tokens")
    for row in batch.select(columns).to_pylist():
        if row["state"] in records.ANSWERED:
            count = row["num_completion_tokens"]
            tokens["completion"] += count
            tokens["context"] += count * row["num_prompt_tokens"] + count * (count - 1) // 2
            lengths[str(bucket(count))] += 1
            if row["sample_index"] == 0:
                tokens["prompt"] += row["num_prompt_tokens"]
