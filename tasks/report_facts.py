"""What a run's report is drawn from: commits, receipts, and a look into a few parts."""

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from storage import keys, records
from storage.commits import CommitCache, current_commits
from storage.manifest import CommitRecord, PlanManifest, RunManifest, RunRecord, digest
from storage.object_store import ObjectStore
from storage.reveal import read_manifest
from tasks.history import num_generated_tokens
from tasks.job import job_of
from tasks.lengths import merged
from tasks.run_receipt import run_rate, run_roofline, run_seconds, run_summary
from tasks.run_record import planned, read_record

NUM_SLOWEST = 8
NUM_COMPLETIONS = 10
_MAX_PARTS = 5  # parts looked into for the kinds of failure
_ENOUGH_ROWS = 10  # of each failed state
_MAX_KINDS = 12
_SHOWN_CHARS = 600
_BINS = 60
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_NUMBER = re.compile(r"\d[\d,.]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFacts:
    """Plain values; nothing here is drawn yet."""

    uri: str
    record: RunRecord
    plan: PlanManifest
    manifest: RunManifest | None
    is_private: bool
    num_committed: int
    rows_by_state: dict[str, int]
    seconds: dict[str, float]
    """Over all replicas, by phase."""

    num_completion_tokens: int
    """Generated in this run."""

    wall_s: float
    """From the first shard's start to the last one's commit."""

    usd: float | None
    num_replicas: int
    devices: list[str]
    rates: list[tuple[float, float]]
    """Minutes since the start, and completion tokens per second then."""

    completion_tokens_histogram: dict[str, int]
    shards: list[dict[str, Any]]
    """The slowest, slowest first: id, attempt, rows, tokens/s, wall_s, summary."""

    device: list[dict[str, float]]
    """Per shard in the order of commits: minutes, memory in GB, utilisation, KV occupancy."""

    failures: list[tuple[str, str, int]]
    """State, kind of error, rows; from the parts looked into."""

    num_failing_parts: int
    """Parts that have a failed row."""

    num_looked_into: int
    """Of them, those that `failures` comes from: each is downloaded."""

    completions: list[dict[str, Any]]
    num_repetitive: int
    num_reused: int
    """Rows copied from earlier runs."""

    roofline: dict[str, float | None]
    rate: float | None
    """Completion tokens per second of a replica."""

    summary: str


def report_facts(store: ObjectStore, *, cache: CommitCache | None = None) -> ReportFacts:
    """Collect them; `cache` has commits known already.

    Raises:
        BadInput: the folder is not a planned run's.
        StorageError: a part or commit cannot be read.
    """
    record, plan = read_record(store), planned(store)
    commits = current_commits(store, digest(store.get(keys.PLAN)), cache=cache)
    ordered = sorted(commits.values(), key=lambda c: (c.committed_at, c.shard_id))
    receipts = [commit.receipt for commit in ordered]
    job = job_of(record)
    counts: Counter[str] = Counter()
    for commit in ordered:
        counts.update(commit.counts)
    start, end = _span(ordered)
    prices = [receipt.get("usd") for receipt in receipts]
    failing = [c for c in ordered if records.num_unanswered(c.counts)]
    failures, num_looked_into = _failures(store, failing)
    return ReportFacts(
        uri=store.uri,
        record=record,
        plan=plan,
        manifest=read_manifest(store),
        is_private=job.output.private,
        num_committed=len(commits),
        rows_by_state={state: counts[state] for state in records.STATES if counts[state]},
        seconds=run_seconds(receipts),
        num_completion_tokens=sum(map(num_generated_tokens, receipts)),
        wall_s=(end - start).total_seconds() if start and end else 0.0,
        usd=sum(p for p in prices if p is not None) if prices and None not in prices else None,
        num_replicas=len({commit.holder for commit in ordered}),
        devices=sorted({r["engine"]["device"] for r in receipts if r.get("num_sequences")}),
        rates=_rates(ordered, start, end),
        completion_tokens_histogram=merged(
            r.get("completion_tokens_histogram") or {} for r in receipts
        ),
        shards=_slowest(ordered),
        device=_device(ordered, start),
        failures=failures,
        num_failing_parts=len(failing),
        num_looked_into=num_looked_into,
        completions=[] if job.output.private else _completions(store, ordered),
        num_repetitive=sum(r.get("num_repetitive") or 0 for r in receipts),
        num_reused=sum(r.get("num_reused_rows") or 0 for r in receipts),
        roofline=run_roofline(receipts),
        rate=run_rate(receipts),
        summary=run_summary(receipts),
    )


def error_kind(error: str | None) -> str:
    """Return an error without its values, so that equal faults count together and no text leaks."""
    return _NUMBER.sub("N", _QUOTED.sub("'...'", error or "no reason given"))[:160]


def _span(ordered: list[CommitRecord]) -> tuple[datetime | None, datetime | None]:
    if not ordered:
        return None, None
    starts = [
        datetime.fromisoformat(c.committed_at) - timedelta(seconds=c.receipt.get("wall_s") or 0.0)
        for c in ordered
    ]
    return min(starts), datetime.fromisoformat(ordered[-1].committed_at)


def _rates(
    ordered: list[CommitRecord], start: datetime | None, end: datetime | None
) -> list[tuple[float, float]]:
    """Spread each shard's tokens evenly over the time it took."""
    if start is None or end is None or end <= start:
        return []
    width = (end - start).total_seconds() / _BINS
    tokens = [0.0] * _BINS
    for commit in ordered:
        last = (datetime.fromisoformat(commit.committed_at) - start).total_seconds()
        wall = max(commit.receipt.get("wall_s") or 0.0, 1e-6)
        count = num_generated_tokens(commit.receipt)
        for index in range(_BINS):
            low, high = max(last - wall, index * width), min(last, (index + 1) * width)
            if high > low:
                tokens[index] += count * (high - low) / wall
    return [((i + 0.5) * width / 60, value / width) for i, value in enumerate(tokens)]


def _slowest(ordered: list[CommitRecord]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "shard_id": commit.shard_id,
            "attempt": commit.attempt,
            "num_rows": commit.part.num_rows,
            "tokens_per_s": commit.receipt.get("completion_tokens_per_s"),
            "wall_s": commit.receipt.get("wall_s") or 0.0,
            "summary": commit.receipt.get("summary") or "",
        }
        for commit in ordered
        if commit.receipt.get("num_sequences")
        and commit.receipt.get("completion_tokens_per_s") is not None
    ]
    rows.sort(key=lambda row: (row["tokens_per_s"], -row["wall_s"]))
    return rows[:NUM_SLOWEST]


def _device(ordered: list[CommitRecord], start: datetime | None) -> list[dict[str, float]]:
    found = []
    for commit in ordered:
        receipt = commit.receipt
        if start is None or not receipt.get("peak_device_bytes"):
            continue
        at = (datetime.fromisoformat(commit.committed_at) - start).total_seconds() / 60
        row = {
            "minutes": at,
            "memory_gb": receipt["peak_device_bytes"] / 1e9,
            "kv_occupancy": receipt.get("kv_occupancy") or 0.0,
        }
        told = receipt.get("device") or {}
        if told.get("mean_utilisation") is not None:
            row["utilisation"] = told["mean_utilisation"]
        found.append(row)
    return found


def _parts(store: ObjectStore, commits: list[CommitRecord], columns: list[str]) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        for commit in commits:
            store.download(commit.part.key, path)
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=16_384, columns=columns)


def _failures(
    store: ObjectStore, failing: list[CommitRecord]
) -> tuple[list[tuple[str, str, int]], int]:
    """Return kinds of failure, and how many parts they come from: few, spread over the run.

    The first part tells most; others follow until each failed state has been seen a few times.
    """
    wanted: Counter[str] = Counter()
    for commit in failing:
        wanted.update({s: n for s, n in commit.counts.items() if s not in records.ANSWERED})
    kinds: Counter[tuple[str, str]] = Counter()
    seen: Counter[str] = Counter()
    looked = 0
    for commit in _spread(failing, _MAX_PARTS):
        if all(seen[state] >= min(_ENOUGH_ROWS, count) for state, count in wanted.items()):
            break
        looked += 1
        for batch in _parts(store, [commit], ["state", "error"]):
            for row in batch.to_pylist():
                if row["state"] not in records.ANSWERED:
                    kinds[row["state"], error_kind(row["error"])] += 1
                    seen[row["state"]] += 1
    most = [(state, kind, count) for (state, kind), count in kinds.most_common(_MAX_KINDS)]
    return most, looked


def _spread(commits: list[CommitRecord], count: int) -> list[CommitRecord]:
    return commits[:: max(1, -(-len(commits) // count))][:count]


def _completions(store: ObjectStore, ordered: list[CommitRecord]) -> list[dict[str, Any]]:
    """The first answers of parts spread over the run."""
    chosen = _spread(ordered, NUM_COMPLETIONS)
    each = -(-NUM_COMPLETIONS // max(1, len(chosen)))
    columns = ["row_index", "state", "completion", "num_completion_tokens"]
    found: list[dict[str, Any]] = []
    for commit in chosen:
        answered = [
            row
            for batch in _first(_parts(store, [commit], columns))
            for row in batch.slice(0, 256).to_pylist()
            if row["state"] in records.ANSWERED
        ]
        found += [{**row, "completion": _clipped(row["completion"])} for row in answered[:each]]
    return found[:NUM_COMPLETIONS]


def _first(batches: Iterator[Any]) -> list[Any]:
    return [batch for batch, _ in zip(batches, range(1), strict=False)]


def _clipped(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def finish_share(counts: Mapping[str, int]) -> float | None:
    """Of all rows, those with an answer."""
    total = sum(counts.values())
    return sum(counts.get(s, 0) for s in records.ANSWERED) / total if total else None
