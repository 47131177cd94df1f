"""Which answers a committed part holds: one digest per output row, in the part's order.

    _attempts/00042/003/answers.parquet   beside the part; null where a row is not `ok`

A later run that wants the same answer finds it here without reading the part. Nothing of the run
itself depends on it: without it, nothing can be reused, and that is all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from storage import keys
from storage.errors import CorruptObject
from storage.manifest import CommitRecord, digest, file_digest

ANSWERS = "answers.parquet"
NUM_BYTES = 16
_SCHEMA = pa.schema([pa.field("answer", pa.binary(NUM_BYTES))])


class WrittenAnswers(NamedTuple):
    """A finished local file."""

    path: Path
    sha256: str  # `sha256:` and 64 hex digits
    num_answers: int


def write_answers(path: Path, digests: bytes, is_ok: Sequence[bool]) -> WrittenAnswers:
    """Write the digests of a part's rows, `NUM_BYTES` each; rows that are not ok have none.

    Raises:
        ValueError: there are more or fewer digests than rows.
    """
    if len(digests) != NUM_BYTES * len(is_ok):
        raise ValueError(f"{len(digests)} bytes of digests for {len(is_ok)} rows")
    validity = pa.array(is_ok, pa.bool_()).buffers()[1]
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(NUM_BYTES), len(is_ok), [validity, pa.py_buffer(digests)]
    )
    table = pa.Table.from_arrays([column], schema=_SCHEMA)
    # Digests neither compress nor repeat.
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    return WrittenAnswers(path, file_digest(path), sum(is_ok))


def read_answers(data: bytes, *, sha256: str, source: str) -> pa.FixedSizeBinaryArray:
    """Return the digests of a part's rows, null where there is none.

    Raises:
        CorruptObject: these are not the bytes that were committed.
    """
    found = digest(data)
    if found != sha256:
        raise CorruptObject(f"{source}: is {found}, its commit says {sha256}")
    column = pq.read_table(pa.BufferReader(data)).column("answer").combine_chunks()
    return column if isinstance(column, pa.FixedSizeBinaryArray) else column.chunk(0)


def answers_key(record: CommitRecord) -> str:
    """Where a commit's answers are, if its receipt names any."""
    return keys.attempt(record.shard_id, record.attempt, ANSWERS)
