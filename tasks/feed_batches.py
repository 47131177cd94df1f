"""What a feed's child sends for a batch: counts for planning, or whole rows; and reading it back."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from inference.row_sampling import row_sampling
from inference.sampling import SamplingParams
from storage.answers import NUM_BYTES
from tasks.content import prompt_digest, row_digest
from tasks.feed_spec import STATE_CODES
from tasks.prepare import Row

_MARK = "__nightjar_row:"
_ROW_FIELDS = [
    pa.field("token_ids", pa.large_list(pa.int32())),
    pa.field("num_tokens", pa.int32()),
    pa.field("state", pa.string()),
    pa.field("error", pa.string()),
    pa.field("key", pa.string()),
    pa.field("overrides", pa.string()),
    pa.field("is_thinking", pa.bool_()),
]
_COUNT_SCHEMA = pa.schema(
    [
        pa.field("num_tokens", pa.int32()),
        pa.field("state", pa.int8()),
        pa.field("error", pa.string()),
        pa.field("digest", pa.uint64()),
        pa.field("num_shared", pa.int32()),
        pa.field("is_truncated", pa.bool_()),
        pa.field("prompt", pa.uint64()),
        pa.field("content", pa.binary(NUM_BYTES)),
    ]
)
_MAX_PREFIXES = 200_000


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """One input row, ready for the engine, or why it is not."""

    row_index: int
    """Global, from 0."""

    token_ids: Sequence[int]
    """The prompt; empty when the row cannot run."""

    sampling: SamplingParams
    """The run's with the row's own overrides; `n` and `logprobs` are always the run's."""

    row_key: int | str
    """What the row's draws derive from: its id where there is one, else its index."""

    num_prompt_tokens: int | None
    """None when it is not known; for an overlong prompt, its real length."""

    state: str | None
    """None: can run. Else overlong or invalid_input."""

    error: str | None
    is_thinking: bool
    """The prompt ends inside an open `<think>`."""


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """Consecutive rows with the input columns that are copied through."""

    row_start: int
    columns: pa.RecordBatch
    rows: list[PreparedRow]
    read_s: float = 0.0
    """Seconds the child took to read it."""

    tokenise_s: float = 0.0
    """Seconds the child took to render and tokenise it."""


class Counter:
    """Estimates how many prompt tokens are shared prefixes, in bounded memory.

    Prefixes of 32, 64, 128, ... tokens are remembered by digest; a longer one only once the next
    shorter has been seen twice.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def num_shared(self, token_ids: Sequence[int]) -> int:
        """Return how long a prefix of this prompt an earlier one had."""
        shared, length = 0, 32
        packed = array("i", token_ids[:32]).tobytes()
        while length <= len(token_ids):
            digest = hashlib.blake2b(packed, digest_size=8).digest()
            if digest not in self._seen:
                if len(self._seen) < _MAX_PREFIXES:
                    self._seen.add(digest)
                break
            shared, length = length, length * 2
            packed = array("i", token_ids[:length]).tobytes()
        return shared


def key_digest(key: int | str) -> int:
    """Return 64 bits of an id; text and numbers never share one by spelling."""
    text = f"{type(key).__name__[0]}{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def to_counts(rows: list[Row], counter: Counter, *, has_id: bool, run: SamplingParams) -> pa.Buffer:
    """Encode what planning needs of a batch; `run` is the run's sampling."""
    digests = [key_digest(row.key) if has_id and row.key != row.index else None for row in rows]
    arrays = [
        pa.array([row.num_tokens for row in rows], pa.int32()),
        pa.array([STATE_CODES.index(row.state) for row in rows], pa.int8()),
        pa.array([row.error for row in rows], pa.string()),
        pa.array(digests, pa.uint64()),
        pa.array([counter.num_shared(row.token_ids) for row in rows], pa.int32()),
        pa.array([row.is_truncated for row in rows], pa.bool_()),
        *_contents(rows, run),
    ]
    return _encode(pa.RecordBatch.from_arrays(arrays, schema=_COUNT_SCHEMA))


def _contents(rows: list[Row], run: SamplingParams) -> tuple[pa.Array, pa.Array]:
    """Return digests of what the rows' prompts are, and of what is asked of them; null for bad rows."""
    prompts: list[int | None] = []
    contents: list[bytes | None] = []
    for row in rows:
        if row.state is not None:
            prompts.append(None)
            contents.append(None)
            continue
        prompt = prompt_digest(row.token_ids, is_thinking=row.is_thinking)
        sampling = row_sampling(run, row.overrides)
        prompts.append(int.from_bytes(prompt[:8], "little"))
        contents.append(row_digest(prompt, sampling, row.key))
    return pa.array(prompts, pa.uint64()), pa.array(contents, pa.binary(NUM_BYTES))


def to_rows(rows: list[Row], columns: pa.RecordBatch) -> pa.Buffer:
    """Encode whole rows beside their input columns."""
    flat, offsets = array("i"), array("q", [0])
    for row in rows:
        flat.extend(row.token_ids)
        offsets.append(len(flat))
    token_ids = pa.LargeListArray.from_arrays(
        pa.array(memoryview(offsets), pa.int64()), pa.array(memoryview(flat), pa.int32())
    )
    arrays = [
        token_ids,
        pa.array([row.num_tokens for row in rows], pa.int32()),
        pa.array([row.state for row in rows], pa.string()),
        pa.array([row.error for row in rows], pa.string()),
        pa.array([json.dumps(row.key) for row in rows], pa.string()),
        pa.array(
            [json.dumps(row.overrides) if row.overrides else None for row in rows], pa.string()
        ),
        pa.array([row.is_thinking for row in rows], pa.bool_()),
    ]
    marked = [field.with_name(_MARK + field.name) for field in _ROW_FIELDS]
    schema = pa.schema([*columns.schema, *marked])
    return _encode(pa.RecordBatch.from_arrays([*columns.columns, *arrays], schema=schema))


def from_counts(payload: Any) -> pa.RecordBatch:
    """Read back `to_counts`."""
    return _decode(payload)


def from_rows(payload: Any, row_start: int, run: SamplingParams) -> PreparedBatch:
    """Read back `to_rows`."""
    records = _decode(payload)
    num_columns = records.num_columns - len(_ROW_FIELDS)
    arrays = records.columns
    columns = pa.RecordBatch.from_arrays(
        arrays[:num_columns], schema=pa.schema(list(records.schema)[:num_columns])
    )
    token_ids, *others = arrays[num_columns:]
    values = [other.to_pylist() for other in others]
    offsets = token_ids.offsets.to_pylist()
    flat = token_ids.values.to_numpy()
    rows = []
    for index, (num_tokens, state, error, key, overrides, thinking) in enumerate(
        zip(*values, strict=True)
    ):
        ids = array("i", flat[offsets[index] : offsets[index + 1]].tobytes())
        sampling = run if overrides is None else _sampling(run, overrides, state)
        row = PreparedRow(
            row_start + index, ids, sampling, json.loads(key), num_tokens, state, error, thinking
        )
        rows.append(row)
    return PreparedBatch(row_start, columns, rows)


def error_batch(
    row_start: int, num_rows: int, schema: pa.Schema, run: SamplingParams, error: str
) -> PreparedBatch:
    """Return rows of a file that cannot be read: input columns null, every row `invalid_input`."""
    nulls = [pa.nulls(num_rows, field.type) for field in schema]
    # A batch without columns still has rows.
    columns = pa.RecordBatch.from_arrays(nulls, schema=schema)
    rows = [
        PreparedRow(index, array("i"), run, index, None, "invalid_input", error, False)
        for index in range(row_start, row_start + num_rows)
    ]
    return PreparedBatch(row_start, columns, rows)


def _sampling(run: SamplingParams, overrides: str, state: str | None) -> SamplingParams:
    if state is not None:
        return run  # the overrides may be what is wrong
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(overrides).items()
    }
    return row_sampling(run, values)


def _encode(records: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, records.schema) as writer:
        writer.write_batch(records)
    return sink.getvalue()


def _decode(payload: Any) -> pa.RecordBatch:
    return pa.ipc.open_stream(pa.py_buffer(payload)).read_next_batch()
