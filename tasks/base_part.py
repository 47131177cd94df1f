"""BasePart: the committed part a retry starts from; its answered rows are kept, its failed ones redone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage import records
from storage.shard_writer import read_part
from tasks.results import ResultColumns, SampleKey, SampleResult

_BATCH_ROWS = 1024


@dataclass(slots=True)
class BasePart:
    """A part on the local disk, and which of its rows have no answer."""

    path: Path
    row_start: int
    """Of its shard."""

    failed: frozenset[SampleKey] = field(init=False)
    """Output rows that are to be redone."""

    num_improved: int = 0
    """Of them, those whose new result is another one; counted by `with_results`."""

    def __post_init__(self) -> None:
        self.failed = frozenset(self._failed())

    def with_results(
        self,
        results: Mapping[SampleKey, SampleResult],
        columns: ResultColumns,
        input_schema: Any,
        attempt: int,
    ) -> Iterator[Any]:
        """Yield the part's batches, failed rows replaced where `results` has another outcome."""
        schema = columns.schema(input_schema)
        width = len(input_schema)
        self.num_improved = 0
        for batch in read_part(self.path, batch_rows=_BATCH_ROWS):
            rows = batch.select(range(width, len(schema))).to_pylist()
            for place, old in enumerate(rows):
                result = self._redone(old, results)
                if result is not None:
                    self.num_improved += 1
                    rows[place] = _as_row(result, columns, attempt)
            arrays = [pa.array([row[f.name] for row in rows], f.type) for f in columns.fields]
            yield pa.RecordBatch.from_arrays([*batch.columns[:width], *arrays], schema=schema)

    def _redone(
        self, old: dict[str, Any], results: Mapping[SampleKey, SampleResult]
    ) -> SampleResult | None:
        """Return the new result of a row that was redone with another outcome; None to keep the old."""
        key = self._key(old)
        result = results.get(key) if key in self.failed else None
        return None if result is None or result.state == old["state"] else result

    def _failed(self) -> Iterator[SampleKey]:
        for batch in read_part(self.path, columns=["row_index", "sample_index", "state"]):
            for row in batch.to_pylist():
                if row["state"] not in records.ANSWERED:
                    yield self._key(row)

    def _key(self, row: dict[str, Any]) -> SampleKey:
        return SampleKey(row["row_index"] - self.row_start, row["sample_index"])


def _as_row(result: SampleResult, columns: ResultColumns, attempt: int) -> dict[str, Any]:
    names = [f.name for f in columns.fields]
    arrays = columns.arrays([result], attempt)
    return {name: values[0].as_py() for name, values in zip(names, arrays, strict=True)}
