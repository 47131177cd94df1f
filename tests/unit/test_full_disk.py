"""An attempt that meets a full disk takes its files back, unless they may be committed all the same."""

import threading
from collections import Counter
from pathlib import Path

import pytest

from storage import keys
from storage.answers import WrittenAnswers
from storage.attempts import PART, claim_attempt
from storage.commits import new_nonce
from storage.errors import NoSpace, StorageError, StoreUnavailable
from storage.local_store import LocalStore
from storage.manifest import CommitRecord, PartFile, digest
from storage.object_store import ObjectInfo
from storage.shard_writer import WrittenPart
from tasks.commit_shard import ShardCommitter
from tasks.shard_work import Written

DATA = b"rows"
FULL = NoSpace("needed 1 bytes, free 0; make room, run again")


class FailingStore(LocalStore):
    """Its commits fail one after the other, the last of them after it was done."""

    def __init__(self, root: Path, faults: list[StorageError], *, is_done: bool) -> None:
        super().__init__(root)
        self._faults, self._is_done = faults, is_done

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        if not key.startswith(keys.COMMITS):
            return super().put_if_absent(key, data)
        fault = self._faults.pop(0)
        if self._is_done and not self._faults:
            super().put_if_absent(key, data)
        raise fault


@pytest.mark.parametrize(
    ("faults", "is_done", "is_left"),
    [
        ([FULL], False, False),
        ([FULL], True, True),
        ([StoreUnavailable("no answer"), FULL], False, True),  # the first may still arrive
    ],
)
def test_a_full_disk_leaves_files_only_where_they_may_be_committed(
    tmp_path: Path, faults: list[StorageError], is_done: bool, is_left: bool
) -> None:
    store = FailingStore(tmp_path / "run", list(faults), is_done=is_done)
    local = tmp_path / "local"
    local.write_bytes(DATA)
    stopping = threading.Event()
    stopping.set()  # so that nothing is waited for
    committer = ShardCommitter(store=store, plan_digest="p", holder="h", stopping=stopping)
    claim_attempt(store, 0, "first", "h")
    written = Written(
        WrittenPart(local, len(DATA), digest(DATA), 1),
        Counter(),
        Counter(),
        {},
        WrittenAnswers(local, digest(DATA), 0),
    )
    with pytest.raises(NoSpace):
        committer._store_and_commit(written, record())
    left = [info.key.rpartition("/")[2] for info in store.list(keys.ATTEMPTS)]
    assert left == ["answers.parquet", "attempt.json", PART] if is_left else ["attempt.json"]


def record() -> CommitRecord:
    return CommitRecord(
        shard_id=0,
        revision=1,
        nonce=new_nonce(),
        attempt=1,
        plan_digest="p",
        row_start=0,
        row_end=1,
        part=PartFile(
            key=keys.attempt(0, 1, PART), size=len(DATA), sha256=digest(DATA), num_rows=1
        ),
        counts={},
        receipt={},
        holder="h",
        committed_at="2026-11-25T00:00:00Z",
    )
