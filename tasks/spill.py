"""Spill: a shard's input columns on the local disk, between reading its rows and writing its part."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.local_errors import translate


@dataclass(frozen=True, slots=True)
class Spill:
    """One Arrow stream."""

    path: Path
    schema: Any
    """Arrow schema of every batch."""

    @property
    def num_bytes(self) -> int:
        """Size of what was written."""
        return self.path.stat().st_size

    @contextmanager
    def writing(self) -> Iterator[Callable[[Any], None]]:
        """Yield what appends a batch; only its own faults are the disk's.

        Raises:
            NoSpace, StorageError: the disk is full, or cannot be written.
        """
        with translate(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = pa.OSFile(str(self.path), "wb")
        with file:
            stream = pa.ipc.new_stream(file, self.schema)

            def write(batch: Any) -> None:
                with translate(self.path, batch.nbytes):
                    stream.write_batch(batch)

            yield write
            with translate(self.path):
                stream.close()

    def read(self, *, num_rows: int) -> Iterator[Any]:
        """Yield the batches, `num_rows` rows in all."""
        if not len(self.schema):
            # A stream of no columns forgets how many rows it had.
            nothing = pa.array([{}] * num_rows, pa.struct([]))
            yield pa.RecordBatch.from_struct_array(nothing)
            return
        with pa.OSFile(str(self.path)) as source, pa.ipc.open_stream(source) as batches:
            yield from batches
