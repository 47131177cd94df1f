"""What earlier runs of the same template and model did: lengths, speed, faults. For forecasts only.

One small JSON object per template and model, beside the results: nothing depends on it, the last
writer wins, and a damaged one is an empty one.
"""

import dataclasses
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.errors import NotFound
from storage.manifest import CommitRecord, RunManifest, RunRecord, to_json
from storage.object_store import ObjectStore, open_store
from tasks.job import RunConfig
from tasks.lengths import merged

log = logging.getLogger("nightjar.history")

MAX_RUNS = 8
_FOLDER = "_history"
START_PHASES = ("stage", "load", "warm_up", "start", "canary")
"""Phases a replica goes through once, whatever it is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRun:
    """One published run, in totals over all its shards."""

    run_id: str
    published_at: str
    backend: str
    device: str
    num_replicas: int
    num_rows: int
    """Output rows that reached the engine."""

    num_prompt_tokens: int
    """Prefilled for them: every sample's prompt, without what was reused."""

    num_completion_tokens: int
    completion_tokens_histogram: dict[str, int]
    replica_seconds: dict[str, float]
    """By phase, added up over replicas; together their whole time."""

    rows_by_state: dict[str, int]
    num_repetitive: int = 0
    wall_s: float = 0.0
    """Of the replica that worked longest."""

    usd: float | None = None
    num_tail_tokens: int = 0
    """Of the completion tokens, those of the tails: few sequences at a time, and slow for it."""

    canary_tokens_per_s: float | None = None
    """Of its canary, if it had one: a small batch, and comparable with another such."""

    run_uri: str = ""
    """Its folder; empty in histories of older versions."""

    @property
    def mean_completion_tokens(self) -> float:
        """Tokens a sequence that ran had on average."""
        return self.num_completion_tokens / self.num_rows if self.num_rows else 0.0


@dataclass(frozen=True, slots=True)
class History:
    """Earlier runs, oldest first."""

    runs: tuple[PastRun, ...] = field(default=())

    @property
    def last(self) -> PastRun | None:
        """The latest run that generated anything."""
        useful = [run for run in self.runs if run.num_rows and run.num_completion_tokens]
        return useful[-1] if useful else None

    @property
    def lengths(self) -> dict[str, int]:
        """Completion lengths of all runs kept."""
        return merged(run.completion_tokens_histogram for run in self.runs)


def history_key(job: RunConfig) -> str:
    """Name what lengths depend on: the weights, the prompt's form and the sampling."""
    names = ("prompt", "prompt_column", "messages_column", "chat_template", "chat_template_kwargs")
    parts = {
        "model": dataclasses.asdict(job.model),
        "input": {name: getattr(job.input, name) for name in names},
        "sampling": {
            name: value
            for name, value in dataclasses.asdict(job.sampling).items()
            if name != "seed"
        },
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return f"{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.json"


def open_history(job: RunConfig) -> ObjectStore:
    """Open the folder of this job's history."""
    return open_store(job.output.history or f"{job.output.uri.rstrip('/')}/{_FOLDER}", job.storage)


def read_history(job: RunConfig) -> History:
    """Return what earlier runs did; empty when there is none or it cannot be understood.

    Raises:
        StorageError: the store is away.
    """
    store, key = open_history(job), history_key(job)
    try:
        values = json.loads(store.get(key))
        return History(tuple(PastRun(**run) for run in values["runs"]))
    except NotFound:
        return History()
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s/%s: not a history, ignored: %s", store.uri, key, type(error).__name__)
        return History()


def remember(job: RunConfig, past: PastRun) -> None:
    """Add a run to its job's history; the same run again replaces itself."""
    others = [run for run in read_history(job).runs if run.run_id != past.run_id]
    kept = [*others, past][-MAX_RUNS:]
    document = {"format": 1, "job": job.name, "runs": [dataclasses.asdict(run) for run in kept]}
    open_history(job).put(history_key(job), to_json(document))


def num_generated_tokens(receipt: Mapping[str, Any]) -> int:
    """Return the completion tokens a receipt's time was spent on: all but those that were reused."""
    told = receipt.get("num_completion_tokens") or 0
    return int(told - (receipt.get("num_reused_completion_tokens") or 0))


def past_run(
    record: RunRecord, manifest: RunManifest, commits: Mapping[int, CommitRecord], run_uri: str
) -> PastRun:
    """Add the receipts of a published run up; what it took over from earlier runs is not counted."""
    receipts = [commit.receipt for commit in commits.values()]
    seconds: defaultdict[str, float] = defaultdict(float)
    by_holder: defaultdict[str, float] = defaultdict(float)
    for commit in commits.values():
        for name, value in (commit.receipt.get("seconds") or {}).items():
            seconds[name] += value
        by_holder[commit.holder] += commit.receipt.get("wall_s") or 0.0
    engines: list[dict[str, Any]] = [r["engine"] for r in receipts if r.get("num_sequences")]
    prices = [r.get("usd") for r in receipts]
    return PastRun(
        run_id=record.run_id,
        published_at=manifest.published_at,
        backend=engines[-1]["backend"] if engines else "none",
        device=engines[-1]["device"] if engines else "none",
        num_replicas=max(1, len(by_holder)),
        num_rows=sum(r.get("num_sequences") or 0 for r in receipts),
        num_prompt_tokens=sum(r.get("num_prefilled_tokens") or 0 for r in receipts),
        num_completion_tokens=sum(map(num_generated_tokens, receipts)),
        completion_tokens_histogram=merged(
            r.get("completion_tokens_histogram") or {} for r in receipts
        ),
        replica_seconds={name: round(value, 4) for name, value in sorted(seconds.items())},
        rows_by_state=dict(manifest.counts),
        num_repetitive=sum(r.get("num_repetitive") or 0 for r in receipts),
        wall_s=round(max(by_holder.values(), default=0.0), 4),
        usd=None if None in prices or not prices else round(sum(p for p in prices if p), 6),
        num_tail_tokens=sum(r.get("num_tail_tokens") or 0 for r in receipts),
        run_uri=run_uri,
    )
