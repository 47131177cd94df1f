"""A run that is drained: reveal what is committed, publish when all is, remember and report."""

import dataclasses
import logging
from collections.abc import Mapping

from storage import keys
from storage.commits import CommitCache, current_commits
from storage.errors import StorageError
from storage.manifest import CommitRecord, RunManifest, digest
from storage.object_store import ObjectStore
from storage.reveal import read_manifest
from tasks.canary import read_canary
from tasks.history import past_run, remember
from tasks.job import job_of
from tasks.progress import Progress
from tasks.publish import publish_run, reveal_all
from tasks.run_record import planned, read_record

log = logging.getLogger("nightjar.finish")


def finish(
    store: ObjectStore, progress: Progress, *, cache: CommitCache | None = None
) -> RunManifest | None:
    """Reveal what is committed and publish when every shard is; None while shards are missing.

    Args:
        store: The run folder.
        progress: Counters to keep.
        cache: Commits known already; what is read is added.
    """
    progress.phase = "publishing"
    plan = planned(store)
    plan_digest = digest(store.get(keys.PLAN))
    commits = current_commits(store, plan_digest, cache=cache)
    healed = reveal_all(store, commits)
    if healed:
        log.info("completions brought in line for %d shards", len(healed))
    before = read_manifest(store)
    manifest = publish_run(store, plan, plan_digest, commits)
    if manifest is not None and (before is None or before.revision != manifest.revision):
        remember_run(store, manifest, commits)
        draw_report(store, cache)
    return manifest


def remember_run(
    store: ObjectStore, manifest: RunManifest, commits: Mapping[int, CommitRecord]
) -> None:
    """Keep lengths and speed for the next forecast; a store that refuses costs only that."""
    record = read_record(store)
    if any(commit.revision > 1 for commit in commits.values()):
        return  # the receipts of redone shards cover their redone rows only
    try:
        canary = read_canary(store)
        past = past_run(record, manifest, commits, store.uri)
        rate = None if canary is None else canary.completion_tokens_per_s
        remember(job_of(record), dataclasses.replace(past, canary_tokens_per_s=rate))
    except StorageError as error:
        log.warning("history not written: %s", error)


def draw_report(store: ObjectStore, cache: CommitCache | None = None) -> None:
    """Draw report.html; what goes wrong with it costs the report, never the run."""
    from tasks.report import write_report  # draws, and drawing is heavy

    try:
        write_report(store, cache=cache)
    except StorageError as error:
        log.warning("report not written: %s", error)
