"""plan.parquet: one row per shard."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import CorruptObject
from storage.manifest import Shard

_SCHEMA = pa.schema(
    [
        pa.field("shard_id", pa.int32(), nullable=False),
        pa.field("row_start", pa.int64(), nullable=False),
        pa.field("row_end", pa.int64(), nullable=False),
        pa.field("num_prompt_tokens", pa.int64(), nullable=False),
        pa.field("num_bad_rows", pa.int64(), nullable=False),
    ]
)


def shards_to_bytes(shards: list[Shard]) -> bytes:
    """Encode shards; equal shards give equal bytes."""
    columns = {name: [getattr(shard, name) for shard in shards] for name in _SCHEMA.names}
    sink = io.BytesIO()
    table = pa.table(columns, schema=_SCHEMA)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def shards_from_bytes(data: bytes, *, source: str) -> list[Shard]:
    """Read shards back.

    Raises:
        CorruptObject: not a table of shards, or they are not contiguous from row 0.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        rows = file.read(use_threads=False).cast(_SCHEMA).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptObject(
            f"{source}: not a table of shards: {str(error).splitlines()[0]}"
        ) from None
    shards = [Shard(**row) for row in rows]
    position = 0
    for index, shard in enumerate(shards):
        if (shard.shard_id, shard.row_start) != (index, position) or shard.row_end <= position:
            raise CorruptObject(f"{source}: shard {index} does not follow the one before")
        position = shard.row_end
    return shards
