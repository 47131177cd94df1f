"""The commit protocol: one create-only object makes one attempt the result of its shard.

    claim      _attempts/00042/003/attempt.json        create-only; names the revision it is for
    data       _attempts/00042/003/completions.parquet whole before the next step
    commit     commits/00042.json                      create-only: one attempt per revision
    reveal     completions/part-00042.parquet          a copy, made by whoever comes by (storage.reveal)
    publish    manifest.json                           create-only, once every shard is committed

Safety needs no clock and no lease: a commit never changes, and only what a commit names is real.
A redone shard is revision 2 (`commits/00042.r2.json`), and so on; the highest revision counts. A
tombstone is a commit without a part: it uses up its revision, so that no attempt of a cancelled run can
still become real, and is never counted as a result.
"""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from storage import keys
from storage.attempts import read_attempt
from storage.clock import Clock, SystemClock, timestamp
from storage.errors import AlreadyExists, CorruptObject, FingerprintMismatch, NotFound
from storage.failpoints import failpoint
from storage.manifest import CommitRecord, PartFile
from storage.many import get_many
from storage.object_store import ObjectStore

CommitCache = dict[str, tuple[str, CommitRecord]]
"""Commits already read, by key, with the ETag they had; a commit never changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitOutcome:
    """What became of an attempt."""

    won: bool
    """Ours is the shard's result, in this revision."""

    record: CommitRecord
    """The commit that stands: ours, another's, or a tombstone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commits:
    """Every commit of a run at one moment."""

    current: dict[int, CommitRecord]
    """By shard: the highest revision that is of this plan and no tombstone."""

    last_revision: dict[int, int]
    """By shard: the highest revision of any kind."""

    def next_revision(self, shard_id: int) -> int:
        """The revision an attempt at this shard has to be for."""
        return self.last_revision.get(shard_id, 0) + 1


def new_nonce() -> str:
    """Return 128 random bits; a commit carries them to be known again."""
    return secrets.token_hex(16)


def commit_attempt(store: ObjectStore, record: CommitRecord) -> CommitOutcome:
    """Make this attempt the shard's result, or learn which one is.

    Atomic: one create-only put. Safe to repeat with the same record, whatever happened to the reply. A
    loser leaves its files alone: `collect_garbage` knows whose they are.

    Raises:
        CorruptObject: the part is not there in its promised size, or the attempt was not claimed
            for this revision.
        FingerprintMismatch: the commit that stands is of another plan.
    """
    key = keys.commit(record.shard_id, record.revision)
    fault = _unready(store, record)
    if fault is not None:
        # Somebody may have committed, and somebody else collected our files, just now.
        standing = _read(store, key)
        if standing is None:
            raise CorruptObject(fault)
    else:
        # Not read before: the create-only put asks and decides at once.
        failpoint("before_commit")
        standing = _create(store, key, record)
        failpoint("after_commit")
    if standing.plan_digest != record.plan_digest:
        raise FingerprintMismatch(
            f"{store.uri}/{key}: belongs to plan {standing.plan_digest}, ours is "
            f"{record.plan_digest}; use another output folder"
        )
    return CommitOutcome(won=standing.nonce == record.nonce, record=standing)


def bury(
    store: ObjectStore,
    shard_id: int,
    *,
    plan_digest: str,
    revision: int,
    reason: str,
    holder: str,
    clock: Clock | None = None,
) -> CommitOutcome:
    """Use up a revision with a tombstone: no attempt for it can become real any more.

    `won` is False when an attempt had committed before.
    """
    tombstone = CommitRecord(
        shard_id=shard_id,
        revision=revision,
        nonce=new_nonce(),
        attempt=0,
        plan_digest=plan_digest,
        row_start=0,
        row_end=0,
        part=PartFile(key="", size=0, sha256="", num_rows=0),
        counts={},
        receipt={},
        holder=holder,
        committed_at=timestamp(clock or SystemClock()),
        tombstone=reason,
    )
    standing = _create(store, keys.commit(shard_id, revision), tombstone)
    return CommitOutcome(won=standing.nonce == tombstone.nonce, record=standing)


def read_commits(
    store: ObjectStore, plan_digest: str, *, cache: CommitCache | None = None
) -> Commits:
    """Read every commit of the run: one listing, and one read for each not yet in `cache`."""
    current: dict[int, CommitRecord] = {}
    last_revision: dict[int, int] = {}
    for record in all_commits(store, cache=cache):
        shard_id = record.shard_id
        last_revision[shard_id] = max(record.revision, last_revision.get(shard_id, 0))
        if record.plan_digest != plan_digest or record.tombstone is not None:
            continue
        known = current.get(shard_id)
        if known is None or record.revision > known.revision:
            current[shard_id] = record
    return Commits(current=dict(sorted(current.items())), last_revision=last_revision)


def current_commits(
    store: ObjectStore, plan_digest: str, *, cache: CommitCache | None = None
) -> dict[int, CommitRecord]:
    """Return the commit that counts, for each committed shard of this plan, by shard."""
    return read_commits(store, plan_digest, cache=cache).current


def newer_commit(store: ObjectStore, record: CommitRecord) -> CommitRecord | None:
    """Return the commit that counts instead of this one, of a higher revision: most often one listing."""
    found = [
        later
        for later in all_commits(store, shard_id=record.shard_id, above=record.revision)
        if later.plan_digest == record.plan_digest and later.tombstone is None
    ]
    return max(found, key=lambda later: later.revision, default=None)


def all_commits(
    store: ObjectStore,
    *,
    shard_id: int | None = None,
    above: int = 0,
    cache: CommitCache | None = None,
) -> Iterator[CommitRecord]:
    """Yield every commit, of all revisions and plans, tombstones too.

    Args:
        store: The run folder.
        shard_id: Only this shard's.
        above: Only revisions higher than this.
        cache: Commits known already, which are not read again; what is read is added.
    """
    prefix = keys.COMMITS if shard_id is None else f"{keys.COMMITS}{keys.shard_name(shard_id)}."
    cache = {} if cache is None else cache
    found = [
        info
        for info in store.list(prefix)
        if (place := keys.parse_commit(info.key)) is not None and place.revision > above
    ]
    fresh = [info for info in found if cache.get(info.key, ("", None))[0] != info.etag]
    for info, data in zip(fresh, get_many(store, [info.key for info in fresh]), strict=True):
        if data is not None:  # else it was deleted after the listing
            cache[info.key] = (info.etag, _parse(store, info.key, data))
    yield from (cache[info.key][1] for info in found if info.key in cache)


def _parse(store: ObjectStore, key: str, data: bytes) -> CommitRecord:
    record = CommitRecord.from_json(data, source=f"{store.uri}/{key}")
    if (record.shard_id, record.revision) != keys.parse_commit(key):
        raise CorruptObject(
            f"{store.uri}/{key}: says shard {record.shard_id} revision {record.revision}; "
            "it was put there by something else"
        )
    return record


def _create(store: ObjectStore, key: str, record: CommitRecord) -> CommitRecord:
    """Create the commit; return the one that stands then."""
    try:
        store.put_if_absent(key, record.to_json())
    except AlreadyExists:
        # Not yet lost: an earlier try of ours, whose reply got lost, may have written it.
        return CommitRecord.from_json(store.get(key), source=f"{store.uri}/{key}")
    return record


def _read(store: ObjectStore, key: str) -> CommitRecord | None:
    try:
        return CommitRecord.from_json(store.get(key), source=f"{store.uri}/{key}")
    except NotFound:
        return None


def _unready(store: ObjectStore, record: CommitRecord) -> str | None:
    """Say why the attempt cannot be committed; None if it can."""
    name = f"shard {record.shard_id} attempt {record.attempt}"
    place = keys.parse_attempt(record.part.key)
    if place is None or (place.shard_id, place.attempt) != (record.shard_id, record.attempt):
        return f"{name}: its part {record.part.key!r} is not under its own prefix"
    attempt = read_attempt(store, record.shard_id, record.attempt)
    if attempt is None:
        return f"{name}: was never claimed; claim it before writing"
    if attempt.revision != record.revision:
        return f"{name}: claimed for revision {attempt.revision}, not {record.revision}"
    try:
        size = store.head(record.part.key).size
    except NotFound:
        return f"{name}: {record.part.key} is not there; write it before the commit"
    if size != record.part.size:
        return f"{name}: {record.part.key} has {size} bytes, promised were {record.part.size}"
    return None
