"""Write one attempt's completions to a local Parquet file: batch by batch, then size and digest.

Row groups are cut by decoded bytes, so the writer's memory does not grow with the shard. Pages carry
checksums, so damage is found by whoever reads them.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from storage.manifest import file_digest

ROW_GROUP_BYTES = 32 * 1024 * 1024


class WrittenPart(NamedTuple):
    """A finished local file."""

    path: Path
    size: int  # bytes
    sha256: str  # `sha256:` and 64 hex digits
    num_rows: int


class PartWriter:
    """Use as a context manager; `finish` describes the file. Leaving early leaves an unusable file."""

    def __init__(self, path: Path, schema: Any) -> None:
        self._path = path
        self._schema = schema
        self._pending: list[Any] = []
        self._pending_bytes = 0
        self._num_rows = 0
        self._writer = pq.ParquetWriter(
            path, schema, compression="zstd", write_page_checksum=True, write_page_index=True
        )

    def write(self, batch: Any) -> None:
        """Append a record batch of the writer's schema."""
        self._pending.append(batch)
        self._pending_bytes += batch.nbytes
        self._num_rows += batch.num_rows
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def finish(self) -> WrittenPart:
        """Write the footer and return size, digest and rows."""
        self._flush()
        self._writer.close()
        return WrittenPart(
            self._path, self._path.stat().st_size, file_digest(self._path), self._num_rows
        )

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_batches(self._pending, self._schema)
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._pending, self._pending_bytes = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()


def read_part(
    path: Path, *, columns: list[str] | None = None, batch_rows: int = 1024
) -> Iterator[Any]:
    """Yield the rows of a part in order, page checksums verified; no batch is larger than a row group."""
    with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            yield from file.iter_batches(
                batch_size=batch_rows, row_groups=[group], columns=columns, use_threads=False
            )
