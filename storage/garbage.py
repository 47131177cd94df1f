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

_Files = dict[int, list[ObjectInfo]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What was, or would be, deleted."""

    keys: tuple[str, ...]
    num_bytes: int
    num_swept: int
    """Half-written files of killed processes, in a local folder."""


def collect_garbage(store: ObjectStore, *, dry_run: bool = False) -> Garbage:
    """Delete the files of attempts that can never become real; `dry_run` only names them.

    Safe at any moment, beside any number of running attempts and other collections.
    """
    attempts = _attempts_by_shard(store)
    # After the attempts: a commit seen here stands for ever, one not seen only keeps files a while longer.
    commits: dict[int, list[CommitRecord]] = {}
    for record in all_commits(store):
        commits.setdefault(record.shard_id, []).append(record)
    found = [
        info
        for shard_id, files in attempts.items()
        for info in _garbage_of(store, shard_id, files, commits.get(shard_id, []))
    ]
    num_swept = 0
    if not dry_run:
        for info in found:
            store.delete(info.key)
            failpoint("after_delete")
        if isinstance(store, LocalStore):
            num_swept = store.sweep()
    return Garbage(
        keys=tuple(info.key for info in found),
        num_bytes=sum(info.size for info in found),
        num_swept=num_swept,
    )


def _attempts_by_shard(store: ObjectStore) -> dict[int, _Files]:
    shards: dict[int, _Files] = {}
    for info in store.list(keys.ATTEMPTS):
        place = keys.parse_attempt(info.key)
        if place is not None:
            shards.setdefault(place.shard_id, {}).setdefault(place.attempt, []).append(info)
    return shards


def _garbage_of(
    store: ObjectStore, shard_id: int, attempts: _Files, commits: list[CommitRecord]
) -> Iterator[ObjectInfo]:
    """Yield in the order of deletion: an attempt's claim after everything else it has."""
    if not commits:
        return
    live = {record.part.key for record in commits}
    committed = {record.attempt for record in commits}
    taken = {record.revision for record in commits}
    for number, files in sorted(attempts.items()):
        if number in committed:
            continue
        attempt = read_attempt(store, shard_id, number)
        if attempt is not None and attempt.revision not in taken:
            continue
        claim = keys.attempt(shard_id, number, ATTEMPT)
        yield from (info for info in files if info.key != claim and info.key not in live)
        if number != max(attempts):
            yield from (info for info in files if info.key == claim)
