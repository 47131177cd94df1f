"""What readers see: committed parts under `completions/`, and the run manifest.

A part is copied by the store. Its receipt under `metrics/` is written after the copy and tells which
revision was copied and which ETag the copy has, so that a copy once made is known again, and one
that a slow copier of an older revision overwrote is found and mended.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from storage import keys
from storage.commits import newer_commit
from storage.errors import AlreadyExists, CorruptObject, NotFound
from storage.failpoints import failpoint
from storage.manifest import CommitRecord, Json, RunManifest, digest, to_json
from storage.many import get_many
from storage.object_store import ObjectInfo, ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishOutcome:
    """What became of a manifest."""

    won: bool
    """Ours is the manifest of this revision."""

    manifest: RunManifest
    """The one that stands under this revision."""


def reveal(store: ObjectStore, record: CommitRecord, *, is_new: bool = False) -> CommitRecord:
    """Put the committed part under `completions/` and return the commit whose part is there now.

    Idempotent; whoever finds a commit may do it. After the copy it looks once more for a higher revision
    and copies that one, so a slow copier cannot leave an old part standing.

    Args:
        store: The run folder.
        record: The commit.
        is_new: It was made just now, so there is no need to look whether it is revealed.

    Raises:
        CorruptObject: the copy does not have the promised size.
    """
    if record.tombstone is not None:
        raise ValueError(f"shard {record.shard_id}: a tombstone has nothing to reveal")
    while True:
        if is_new or not _is_there(store, record):
            _copy(store, record)
        newer = newer_commit(store, record)
        if newer is None:
            return record
        record, is_new = newer, False


def unrevealed(store: ObjectStore, records: Iterable[CommitRecord]) -> list[CommitRecord]:
    """Return the commits whose part is not, or no longer, under `completions/`."""
    wanted = list(records)
    seen = {info.key: info for info in store.list(keys.COMPLETIONS)}
    marks = get_many(store, (keys.metrics(record.shard_id) for record in wanted))
    return [
        record
        for record, mark in zip(wanted, marks, strict=True)
        if not _is_revealed(record, seen.get(keys.completions(record.shard_id)), mark)
    ]


def manifest_part(record: CommitRecord) -> Json:
    """Return the commit's entry in `RunManifest.parts`."""
    return {
        "shard_id": record.shard_id,
        "revision": record.revision,
        "key": keys.completions(record.shard_id),
        "size": record.part.size,
        "sha256": record.part.sha256,
        "num_rows": record.part.num_rows,
        "commit_digest": digest(record.to_json()),
    }


def publish(store: ObjectStore, manifest: RunManifest) -> PublishOutcome:
    """Make the run official, once: create the manifest, or learn which one stands.

    Safe to repeat. A later revision follows one that is there.

    Raises:
        ValueError: parts or rows do not add up, or the revision before is missing.
        CorruptObject: a part under `completions/` is missing or of another size.
    """
    _require_whole(store, manifest)
    key = keys.manifest(manifest.revision)
    failpoint("before_publish")
    try:
        store.put_if_absent(key, manifest.to_json())
    except AlreadyExists:
        standing = RunManifest.from_json(store.get(key), source=f"{store.uri}/{key}")
        return PublishOutcome(won=False, manifest=standing)
    failpoint("after_publish")
    return PublishOutcome(won=True, manifest=manifest)


def read_manifest(store: ObjectStore) -> RunManifest | None:
    """Return the manifest of the highest revision; None while the run is unpublished."""
    revision = _last_manifest(store)
    if not revision:
        return None
    key = keys.manifest(revision)
    return RunManifest.from_json(store.get(key), source=f"{store.uri}/{key}")


def _copy(store: ObjectStore, record: CommitRecord) -> None:
    target = keys.completions(record.shard_id)
    failpoint("before_reveal")
    try:
        copied = store.copy(record.part.key, target, size=record.part.size)
    except NotFound as error:
        raise CorruptObject(
            f"{store.uri}/{record.part.key}: a commit names it, but it is gone; redo shard "
            f"{record.shard_id} by `nightjar retry`"
        ) from error
    failpoint("after_copy")
    if copied.size != record.part.size:
        raise CorruptObject(
            f"{store.uri}/{target}: {copied.size} bytes, the commit of attempt {record.attempt} "
            f"promises {record.part.size}"
        )
    receipt = {
        **record.receipt,
        "revealed": {"revision": record.revision, "nonce": record.nonce, "etag": copied.etag},
    }
    store.put(keys.metrics(record.shard_id), to_json(receipt))
    failpoint("after_reveal")


def _is_there(store: ObjectStore, record: CommitRecord) -> bool:
    try:
        found = store.head(keys.completions(record.shard_id))
        return _is_revealed(record, found, store.get(keys.metrics(record.shard_id)))
    except NotFound:
        return False


def _is_revealed(record: CommitRecord, found: ObjectInfo | None, metrics: bytes | None) -> bool:
    if found is None or metrics is None or found.size != record.part.size:
        return False
    try:
        mark = json.loads(metrics)["revealed"]
        return bool(mark["nonce"] == record.nonce and mark["etag"] == found.etag)
    except (ValueError, KeyError, TypeError):
        return False


def _require_whole(store: ObjectStore, manifest: RunManifest) -> None:
    num_rows = sum(part["num_rows"] for part in manifest.parts)
    shard_ids = [part["shard_id"] for part in manifest.parts]
    if sorted(shard_ids) != list(range(manifest.num_shards)) or num_rows != manifest.num_rows:
        raise ValueError(
            f"manifest of {manifest.num_shards} shards and {manifest.num_rows} rows has "
            f"{len(shard_ids)} parts with {num_rows} rows; publish when every shard is committed"
        )
    if manifest.revision > 1 and _last_manifest(store) < manifest.revision - 1:
        raise ValueError(f"manifest revision {manifest.revision} must follow the one before")
    sizes = {info.key: info.size for info in store.list(keys.COMPLETIONS)}
    for part in manifest.parts:
        if sizes.get(part["key"]) != part["size"]:
            raise CorruptObject(
                f"{store.uri}/{part['key']}: {sizes.get(part['key'], 'no')} bytes instead of "
                f"{part['size']}; reveal the commit again"
            )


def _last_manifest(store: ObjectStore) -> int:
    revisions = (keys.parse_manifest(info.key) for info in store.list("manifest"))
    return max((revision for revision in revisions if revision is not None), default=0)
