"""One worker of the commit campaign: claims, writes, commits and reveals until no shard is left.

usage: commit_worker.py STORE_URI ENDPOINT_URL NUM_SHARDS ROWS_PER_SHARD SEED VARIANT

It is killed by failpoints. VARIANT is `right`, or a planted bug the campaign must catch.
"""

import json
import random
import sys

from storage import keys
from storage.attempts import PART, claim_attempt
from storage.commits import CommitOutcome, commit_attempt, new_nonce, read_commits
from storage.errors import AlreadyExists, PreconditionFailed
from storage.failpoints import failpoint
from storage.manifest import CommitRecord, PartFile, digest
from storage.object_store import ObjectStore, StorageConfig, open_store
from storage.reveal import reveal
from storage.s3_client import RetryPolicy
from storage.s3_store import S3Store

PLAN = "sha256:plan"
MAX_REVISION = 2


def main(uri: str, endpoint: str, num_shards: int, num_rows: int, seed: int, variant: str) -> None:
    store: ObjectStore
    if uri.startswith("s3://"):
        config = StorageConfig(endpoint_url=endpoint, region="us-east-1")
        store = S3Store(uri, config, retry=RetryPolicy(max_attempts=20, base_s=0.02, cap_s=0.5))
    else:
        store = open_store(uri)
    rng = random.Random(seed)
    # All in the same order: they are to race.
    for shard_id in range(num_shards):
        commits = read_commits(store, PLAN)
        revision = commits.next_revision(shard_id)
        # Now and then redo what is done, as `retry` does.
        if shard_id in commits.current and (revision > MAX_REVISION or rng.random() < 0.8):
            continue
        run_shard(store, shard_id, revision, num_rows, f"{seed}", variant)


def run_shard(
    store: ObjectStore, shard_id: int, revision: int, num_rows: int, holder: str, variant: str
) -> None:
    attempt = claim_attempt(store, shard_id, "campaign", holder, revision=revision)
    rows = range(shard_id * num_rows, (shard_id + 1) * num_rows)
    data = json.dumps([{"row": row, "by": f"{holder}/{attempt}"} for row in rows]).encode()
    key = keys.attempt(shard_id, 1 if variant == "shared data key" else attempt, PART)
    record = CommitRecord(
        shard_id=shard_id,
        revision=revision,
        nonce=new_nonce(),
        attempt=attempt,
        plan_digest=PLAN,
        row_start=rows.start,
        row_end=rows.stop,
        part=PartFile(key=key, size=len(data), sha256=digest(data), num_rows=num_rows),
        counts={"ok": num_rows},
        receipt={},
        holder=holder,
        committed_at="2026-11-25T00:00:00Z",
    )
    if variant == "commit before data":
        commit(store, record, variant)
    store.put(key, data)
    failpoint("after_data")
    outcome = commit(store, record, variant)
    print(f"{shard_id} {revision} {record.nonce} {'won' if outcome.won else 'lost'}", flush=True)
    reveal(store, outcome.record)


def commit(store: ObjectStore, record: CommitRecord, variant: str) -> CommitOutcome:
    key = keys.commit(record.shard_id, record.revision)
    if variant == "right":
        return commit_attempt(store, record)
    if variant == "unconditional commit":
        store.put(key, record.to_json())
        failpoint("after_commit")
        return CommitOutcome(won=True, record=record)
    if variant == "refusal taken as loss":
        assert isinstance(store, S3Store)
        name, data = store._name(key), record.to_json()
        try:
            store._call(key, lambda: store._put_if(name, data, IfNoneMatch="*"))
        except PreconditionFailed:
            standing = CommitRecord.from_json(store.get(key), source=key)
            return CommitOutcome(won=False, record=standing)
        return CommitOutcome(won=True, record=record)
    try:
        store.put_if_absent(key, record.to_json())
        failpoint("after_commit")
    except AlreadyExists:
        standing = CommitRecord.from_json(store.get(key), source=key)
        return CommitOutcome(won=standing.nonce == record.nonce, record=standing)
    return CommitOutcome(won=True, record=record)


if __name__ == "__main__":
    main(
        sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6]
    )
