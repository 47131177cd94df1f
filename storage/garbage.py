"""Garbage: files of attempts that can no longer become real. A rule, never a clock.

An attempt names, when it is claimed, the one revision it may commit. Commits are create-only, so:

    commit of that revision is missing          the attempt may be running: kept, whatever its age
    commit of that revision names the attempt   live: kept for good
    commit of that revision names another,      it can never become real: garbage, even while its
    or is a tombstone                           process still writes (its commit will be refused)

So a retry that writes for revision 2 is safe although its shard is committed in revision 1. Files without
a claim are what an interrupted collection or its late writer left: the claim is deleted last, and only
by the third case; they are garbage once the shard has any commit. The claim of each shard's highest
attempt stays, so that no number is ever used twice. An attempt for a revision nobody has committed is
freed by committing that revision, or by burying it (`commits.bury`) when the run is cancelled.

One process knows more: the attempt's own, the only one that can commit it. When that gives up on a full
disk it may take its files back at once (`withdraw`), so that starts in vain do not fill the disk further.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from storage import keys
from storage.attempts import ATTEMPT, read_attempt
from storage.commits import all_commits
from storage.failpoints import failpoint
from storage.local_store import LocalStore
from storage.manifest import CommitRecord
from storage.object_store import ObjectInfo, ObjectStore

_Files = dict[int, list[ObjectInfo]]  # by attempt number
_Commits = dict[int, list[CommitRecord]]  # by shard, all revisions


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What was, or would be, deleted."""

    keys: tuple[str, ...]
    num_bytes: int
    num_swept: int
    """Unfinished writes of killed processes: hidden files of a folder, multipart uploads of a bucket."""


def collect_garbage(store: ObjectStore, *, dry_run: bool = False) -> Garbage:
    """Delete the files of attempts that can never become real; `dry_run` only names them.

    Safe at any moment, beside any number of running attempts and other collections.
    """
    attempts = _attempts_by_shard(store)
    # After the attempts: a commit seen here stands for ever, one not seen only keeps files a while longer.
    commits: _Commits = {}
    for record in all_commits(store):
        commits.setdefault(record.shard_id, []).append(record)
    found = [
        info
        for shard_id, numbers in attempts.items()
        for info in _garbage_of(store, shard_id, numbers, commits)
    ]
    num_swept = 0
    if not dry_run:
        for info in found:
            store.delete(info.key)
            failpoint("after_delete")
        num_swept = _sweep(store, commits)
    return Garbage(
        keys=tuple(info.key for info in found),
        num_bytes=sum(info.size for info in found),
        num_swept=num_swept,
    )


def withdraw(store: ObjectStore, record: CommitRecord) -> bool:
    """Delete what an attempt has written, but for its claim; False, and nothing is, if it is committed.

    For the attempt's own process alone, which has given it up for good, with no write of it under way or
    unanswered: what is not committed now never will be. A full disk is such an end, an outage is not.
    """
    # Also asked after a commit that failed: the fault may have come once the commit was there.
    if any(
        standing.attempt == record.attempt
        for standing in all_commits(store, shard_id=record.shard_id)
    ):
        return False
    prefix = keys.attempt(record.shard_id, record.attempt, "")
    for info in list(store.list(prefix)):
        if info.key != keys.attempt(record.shard_id, record.attempt, ATTEMPT):
            store.delete(info.key)
            failpoint("after_delete")
    return True


def _attempts_by_shard(store: ObjectStore) -> dict[int, _Files]:
    shards: dict[int, _Files] = {}
    for info in store.list(keys.ATTEMPTS):
        place = keys.parse_attempt(info.key)
        if place is not None:
            shards.setdefault(place.shard_id, {}).setdefault(place.attempt, []).append(info)
    return shards


def _garbage_of(
    store: ObjectStore, shard_id: int, attempts: _Files, commits: _Commits
) -> Iterator[ObjectInfo]:
    """Yield in the order of deletion: an attempt's claim after everything else it has."""
    live = {record.part.key for record in commits.get(shard_id, [])}
    for number, files in sorted(attempts.items()):
        if not _is_dead(store, shard_id, number, commits):
            continue
        claim = keys.attempt(shard_id, number, ATTEMPT)
        yield from (info for info in files if info.key != claim and info.key not in live)
        if number != max(attempts):
            yield from (info for info in files if info.key == claim)


def _is_dead(store: ObjectStore, shard_id: int, number: int, commits: _Commits) -> bool:
    """Whether the attempt can never become real, by the rule above."""
    standing = commits.get(shard_id, [])
    if not standing or any(record.attempt == number for record in standing):
        return False
    attempt = read_attempt(store, shard_id, number)
    return attempt is None or any(record.revision == attempt.revision for record in standing)


def _sweep(store: ObjectStore, commits: _Commits) -> int:
    if isinstance(store, LocalStore):
        return store.sweep()
    if not store.uri.startswith("s3://"):
        return 0
    from storage.s3_store import S3Store  # boto3 takes a while to import

    num_swept = 0
    assert isinstance(store, S3Store)
    for key, upload_id in store.unfinished(keys.ATTEMPTS):
        place = keys.parse_attempt(key)
        if place and _is_dead(store, place.shard_id, place.attempt, commits):
            store.abandon(key, upload_id)
            num_swept += 1
    return num_swept
