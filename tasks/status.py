"""How far a run is, read from the store alone."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from storage import keys, records
from storage.attempts import attempts_of
from storage.commits import CommitCache, current_commits
from storage.manifest import RunManifest, digest
from storage.object_store import ObjectStore
from storage.reveal import read_manifest
from tasks.outlook import Outlook, read_outlook
from tasks.run_record import load_plan, read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run at one moment."""

    uri: str
    run_id: str
    name: str
    is_planned: bool
    num_shards: int = 0
    num_committed: int = 0
    num_rows: int = 0
    rows_by_state: dict[str, int] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    failed_shards: dict[int, str] = field(default_factory=dict)
    """Shards without a commit whose last attempt failed, with its error."""

    manifest: RunManifest | None = None
    outlook: Outlook | None = None
    """When it will be done; None before it is planned and once it is published."""

    @property
    def is_published(self) -> bool:
        """Whether the run has its manifest."""
        return self.manifest is not None

    @property
    def num_failed_rows(self) -> int:
        """Committed output rows without an answer."""
        return records.num_unanswered(self.rows_by_state)

    def as_document(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "run": self.uri,
            "run_id": self.run_id,
            "name": self.name,
            "is_published": self.is_published,
            "revision": self.manifest.revision if self.manifest else None,
            "num_shards": self.num_shards,
            "num_committed_shards": self.num_committed,
            "num_rows": self.num_rows,
            "rows_by_state": self.rows_by_state,
            "num_failed_rows": self.num_failed_rows,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_completion_tokens": self.num_completion_tokens,
            "failed_shards": {f"{i:05d}": error for i, error in self.failed_shards.items()},
            "outlook": self.outlook.as_document() if self.outlook else None,
            "totals": self.manifest.totals if self.manifest else None,
        }


def run_status(store: ObjectStore, *, cache: CommitCache | None = None) -> RunStatus:
    """Read a run's state; `cache` has commits known already. Raises BadInput when it is no run's folder."""
    record = read_record(store)
    plan = load_plan(store)
    if plan is None:
        return RunStatus(uri=store.uri, run_id=record.run_id, name=record.name, is_planned=False)
    commits = current_commits(store, digest(store.get(keys.PLAN)), cache=cache)
    counts: Counter[str] = Counter()
    for commit in commits.values():
        counts.update(commit.counts)
    manifest = read_manifest(store)
    missing = [i for i in range(plan.num_shards) if i not in commits]
    return RunStatus(
        uri=store.uri,
        run_id=record.run_id,
        name=record.name,
        is_planned=True,
        num_shards=plan.num_shards,
        num_committed=len(commits),
        num_rows=plan.num_rows * plan.num_samples,
        rows_by_state={s: counts[s] for s in records.STATES if counts[s]},
        num_prompt_tokens=sum(c.receipt.get("num_prompt_tokens", 0) for c in commits.values()),
        num_completion_tokens=sum(
            c.receipt.get("num_completion_tokens", 0) for c in commits.values()
        ),
        failed_shards=_failed(store, missing),
        manifest=manifest,
        outlook=None if manifest else read_outlook(store, commits=commits),
    )


def _failed(store: ObjectStore, missing: list[int]) -> dict[int, str]:
    found = {}
    for shard_id in missing:
        attempts = attempts_of(store, shard_id)
        failure = attempts[-1].failure if attempts else None
        if failure is not None:
            found[shard_id] = f"{failure.error}: {failure.message}"
    return found
