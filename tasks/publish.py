"""Every shard committed: one manifest makes the run official. Safe to repeat by anybody."""

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from storage import records
from storage.manifest import CommitRecord, PlanManifest, RunManifest
from storage.object_store import ObjectStore
from storage.reveal import manifest_part, publish, read_manifest, reveal, unrevealed
from tasks.run_receipt import run_rate, run_roofline, run_seconds, run_summary


def reveal_all(store: ObjectStore, commits: Mapping[int, CommitRecord]) -> list[int]:
    """Bring `completions/` in line with the commits: copy what is missing or of another size.

    Returns:
        Shards whose part was copied; usually none.
    """
    behind = unrevealed(store, commits.values())
    for record in behind:
        reveal(store, record)
    return [record.shard_id for record in behind]


def publish_run(
    store: ObjectStore, plan: PlanManifest, plan_digest: str, commits: Mapping[int, CommitRecord]
) -> RunManifest | None:
    """Write the run manifest if every shard is committed and the standing one does not say so already.

    Returns:
        The standing manifest, or None while shards are missing.
    """
    if len(commits) != plan.num_shards:
        return None
    standing = read_manifest(store)
    parts = [manifest_part(commits[shard_id]) for shard_id in sorted(commits)]
    if standing is not None and standing.parts == parts:
        return standing
    counts: Counter[str] = Counter()
    for record in commits.values():
        counts.update(record.counts)
    wanted = plan.num_rows * plan.num_samples
    if sum(counts.values()) != wanted:
        raise AssertionError(
            f"{plan.run_id}: {sum(counts.values())} rows committed, {wanted} planned"
        )
    manifest = RunManifest(
        run_id=plan.run_id,
        revision=standing.revision + 1 if standing else 1,
        fingerprint=plan.fingerprint,
        plan_digest=plan_digest,
        num_shards=plan.num_shards,
        num_rows=sum(record.part.num_rows for record in commits.values()),
        counts={state: counts[state] for state in records.STATES if counts[state]},
        num_prompt_tokens=_total(commits, "num_prompt_tokens"),
        num_completion_tokens=_total(commits, "num_completion_tokens"),
        parts=parts,
        totals=_totals(commits),
        published_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return publish(store, manifest).manifest


def num_failed(manifest: RunManifest) -> int:
    """Count output rows without an answer."""
    return records.num_unanswered(manifest.counts)


def _total(commits: Mapping[int, CommitRecord], name: str) -> int:
    return sum(int(record.receipt.get(name) or 0) for record in commits.values())


def _totals(commits: Mapping[int, CommitRecord]) -> dict[str, Any]:
    """Add up the receipts: seconds over all replicas by phase, and dollars when all are priced."""
    receipts = [record.receipt for record in commits.values()]
    usd: list[Any] = [receipt.get("usd") for receipt in receipts]
    rate = run_rate(receipts)
    return {
        "replica_seconds": {n: round(v, 3) for n, v in sorted(run_seconds(receipts).items())},
        "completion_tokens_per_replica_s": None if rate is None else round(rate, 2),
        "roofline": run_roofline(receipts),
        "summary": run_summary(receipts),
        "usd": round(sum(usd), 6) if usd and None not in usd else None,
        "num_reused_rows": _total(commits, "num_reused_rows"),
        "num_attempts": sum(record.attempt for record in commits.values()),
    }
