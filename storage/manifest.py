"""The small JSON objects that make data real: run record, plan, commit, run manifest.

All are strict JSON (no NaN), versioned, and unknown fields are refused when read: a newer writer's
object is never half understood.

    run.json       RunRecord      create-only   the job as resolved, its fingerprint, its inputs
    plan.json      PlanManifest   create-only   shards; names plan.parquet by digest
    commits/*      CommitRecord   create-only   one attempt made real
    manifest*.json RunManifest    create-only   every shard committed: the run is published
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from storage.errors import CorruptObject

FORMAT = 1

Json = dict[str, Any]


def digest(data: bytes) -> str:
    """Name bytes by content: `sha256:` and 64 hex digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """Name a local file by content, as `digest` names bytes; it is read in blocks."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: object) -> bytes:
    """Strict, sorted, readable JSON: equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    """A dataclass that is stored as one JSON object."""

    def to_json(self) -> bytes:
        return to_json({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, data: bytes, *, source: str) -> Self:
        """Read it back; `source` is named when it cannot be.

        Raises:
            CorruptObject: not JSON, another format version, or fields missing or unknown.
        """
        try:
            value = json.loads(data)
            found = value.pop("format")
            if found != FORMAT:
                raise CorruptObject(f"{source}: format {found}, this Nightjar reads {FORMAT}")
            return cls._build(value)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = ascii(str(error))[1:-1][:300]
            raise CorruptObject(f"{source}: not a {cls.__name__}: {reason}") from error

    @classmethod
    def _build(cls, value: Json) -> Self:
        return cls(**value)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One input file as it was planned; a replica refuses another one under the same name."""

    uri: str
    size: int
    etag: str
    format: str
    num_rows: int
    row_start: int
    """Global index of its first row."""

    read_key: str | None = None
    """Run-folder key of its Parquet form, for formats that are converted once at planning."""

    read_etag: str | None = None
    """Digest (`sha256:`) of the object under `read_key`."""

    error: str | None = None
    """Why it is unreadable, when `input.on_bad_file` turns its rows into error rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A fixed, contiguous range of input rows: the unit of lease, attempt and commit."""

    shard_id: int
    row_start: int
    row_end: int
    """Exclusive, global."""

    num_prompt_tokens: int
    """Of the rows that can run."""

    num_bad_rows: int = 0

    @property
    def num_rows(self) -> int:
        return self.row_end - self.row_start


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord(_Document):
    """run.json: what this run folder is."""

    run_id: str
    name: str
    fingerprint: str
    fingerprint_fields: Json
    """Everything that can change a token, by dotted name; compared field by field on a mismatch."""

    job: Json
    """The job as resolved, without secrets."""

    versions: dict[str, str]
    created_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanManifest(_Document):
    """plan.json: the immutable list of shards and what they were cut from."""

    run_id: str
    fingerprint: str
    table_digest: str
    """Digest of plan.parquet, which lists the shards."""

    num_shards: int
    num_rows: int
    num_samples: int
    """Completions per row (`sampling.n`)."""

    num_prompt_tokens: int
    num_bad_rows: int
    bad_rows_by_state: dict[str, int]
    bad_row_examples: list[Json]
    """The first few: row_index, state, error. No prompt text."""

    input_schema: str
    """Base64 of the Arrow IPC schema of the input columns that are copied through."""

    inputs: list[InputFile]
    prompt_columns: Json = field(default_factory=dict)
    """Which columns make a row's prompt, id and parameters, as settled at planning."""

    stats: Json = field(default_factory=dict)
    """Token histogram, shared-prefix saving, seconds taken: for people and forecasts."""

    @classmethod
    def _build(cls, value: Json) -> Self:
        return cls(**{**value, "inputs": [InputFile(**item) for item in value["inputs"]]})


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFile:
    """A committed attempt's data, named by content."""

    key: str
    size: int
    sha256: str
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord(_Document):
    """commits/00042.json: this attempt is the shard's result."""

    shard_id: int
    revision: int
    nonce: str
    """Random; tells our own write from another's when a reply was lost."""

    attempt: int
    plan_digest: str
    """Digest of plan.json: a commit of another plan is not counted."""

    row_start: int
    row_end: int
    part: PartFile
    counts: dict[str, int]
    """Rows by state; they add up to part.num_rows."""

    receipt: Json
    holder: str
    committed_at: str
    tombstone: str | None = None
    """Why nothing will come: uses up the revision of a cancelled shard. It has no part."""

    @classmethod
    def _build(cls, value: Json) -> Self:
        return cls(**{**value, "part": PartFile(**value["part"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunManifest(_Document):
    """manifest.json: every shard is committed; these parts are the run's result."""

    run_id: str
    revision: int
    fingerprint: str
    plan_digest: str
    num_shards: int
    num_rows: int
    """Rows in all parts: input rows times samples."""

    counts: dict[str, int]
    num_prompt_tokens: int
    num_completion_tokens: int
    parts: list[Json]
    """Per shard: shard_id, revision, completions key, size, sha256, num_rows, commit_digest."""

    totals: Json
    """Seconds by phase, tokens/s, and whatever else the receipts add up to."""

    published_at: str
