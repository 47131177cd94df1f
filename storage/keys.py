"""Every key a run writes, relative to the run folder. Nothing else spells one.

run.json  plan.parquet  plan.json  manifest.json  report.html
completions/part-00042.parquet      metrics/part-00042.json
commits/00042.json                  commits/00042.r2.json       (revision 2)
_inputs/00003-9f86d081884c7d65.parquet   a text input, converted once at planning
_job.json                           the job as the latest start of the run resolved it
_canary.json  _canary.parquet       a sample run before the rest, and its answers
_attempts/00042/003/...             whatever one attempt writes, real or not
_leases/00042.json                  _cancel                     _probe/...
"""

import re
from pathlib import PurePosixPath
from typing import NamedTuple

RUN = "run.json"
PLAN = "plan.json"
PLAN_TABLE = "plan.parquet"
REPORT = "report.html"
JOB = "_job.json"
CANCEL = "_cancel"
CANARY = "_canary.json"
CANARY_PART = "_canary.parquet"
COMPLETIONS = "completions/"
METRICS = "metrics/"
COMMITS = "commits/"
ATTEMPTS = "_attempts/"
LEASES = "_leases/"
LEASE_CLOCK = "_leases/clock"  # written to learn the store's time
INPUTS = "_inputs/"
PROBE = "_probe/"

_COMMIT = re.compile(r"commits/(\d{5,})(?:\.r(\d+))?\.json")
_MANIFEST = re.compile(r"manifest(?:\.r(\d+))?\.json")
_ATTEMPT = re.compile(r"_attempts/(\d{5,})/(\d{3,})/(.+)")


class CommitKey(NamedTuple):
    """A commit's place, read back from its key."""

    shard_id: int
    revision: int


class AttemptKey(NamedTuple):
    """An attempt's file, read back from its key."""

    shard_id: int
    attempt: int
    name: str


def shard_name(shard_id: int) -> str:
    """Zero-padded, so that listings sort."""
    return f"{shard_id:05d}"


def completions(shard_id: int) -> str:
    """The one place a reader finds a shard's completions."""
    return f"{COMPLETIONS}part-{shard_name(shard_id)}.parquet"


def metrics(shard_id: int) -> str:
    """The shard's receipt."""
    return f"{METRICS}part-{shard_name(shard_id)}.json"


def commit(shard_id: int, revision: int = 1) -> str:
    """The create-only object that makes one attempt the shard's result."""
    suffix = "" if revision == 1 else f".r{revision}"
    return f"{COMMITS}{shard_name(shard_id)}{suffix}.json"


def manifest(revision: int = 1) -> str:
    """The create-only object that publishes the run."""
    return "manifest.json" if revision == 1 else f"manifest.r{revision}.json"


def attempt(shard_id: int, number: int, name: str) -> str:
    """A file of one attempt; `name` is attempt.json, completions.parquet or failed.json."""
    return f"{ATTEMPTS}{shard_name(shard_id)}/{number:03d}/{name}"


def lease(shard_id: int) -> str:
    """Who is working on the shard now."""
    return f"{LEASES}{shard_name(shard_id)}.json"


def converted_input(file_index: int, digest: str) -> str:
    """A text input as Parquet, named by content: two planners at once never replace each other's."""
    return f"{INPUTS}{shard_name(file_index)}-{digest.removeprefix('sha256:')[:16]}.parquet"


def parse_commit(key: str) -> CommitKey | None:
    """Read a commit's key back; None when the key is something else."""
    match = _COMMIT.fullmatch(key)
    return CommitKey(int(match[1]), int(match[2] or 1)) if match else None


def parse_manifest(key: str) -> int | None:
    """Read a manifest's revision back; None when the key is something else."""
    match = _MANIFEST.fullmatch(key)
    return int(match[1] or 1) if match else None


def parse_attempt(key: str) -> AttemptKey | None:
    """Read an attempt file's key back; None when the key is something else."""
    match = _ATTEMPT.fullmatch(key)
    return AttemptKey(int(match[1]), int(match[2]), match[3]) if match else None


def check(key: str) -> str:
    """Return the key if no store or file system could take it for a path outside its root.

    Raises:
        ValueError: the key is empty, absolute, or has a `..`, NUL or backslash in it,
            or a segment above 255 bytes.
    """
    parts = PurePosixPath(key).parts
    if (
        not parts
        or key.startswith("/")
        or ".." in parts
        or "\0" in key
        or "\\" in key
        or any(len(part.encode()) > 255 for part in parts)
    ):
        raise ValueError(f"unsafe object key {key!r}: use a relative key without '..' segments")
    return key
