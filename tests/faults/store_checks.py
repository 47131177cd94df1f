"""What must hold of a run, read from the store alone, by code of its own.

commits and manifests never change and never vanish           (`Watcher`, all the while)
every part that a commit names is there with its digest       (`Watcher`, and at the end)
each part holds the rows its commit says, each row once, in order
`completions/` holds the highest revision of every shard, and nothing else
the manifest's counts are those of the rows in the parts
"""

import hashlib
import io
import json
import threading
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage import keys
from storage.errors import NotFound, StorageError
from storage.object_store import ObjectStore


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Watcher:
    """Looks at a run again and again, over a connection of its own."""

    def __init__(self, run: ObjectStore, every_s: float) -> None:
        self._run = run
        self._every_s = every_s
        self._seen: dict[str, bytes] = {}
        self._etags: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.wrong: list[str] = []
        self.num_looks = 0

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """Look once: at what is new, and at what a listing says is another object now."""
        listed = [*self._run.list(keys.COMMITS), *self._run.list("manifest")]
        present = {info.key: info.etag for info in listed if is_final(info.key)}
        for key in sorted(self._seen.keys() - present):
            self.wrong.append(f"{key} vanished")
        for key, etag in sorted(present.items()):
            if self._etags.get(key) == etag:
                continue
            self._etags[key] = etag
            data = self._run.get(key)
            if self._seen.setdefault(key, data) != data:
                self.wrong.append(f"{key} changed")
            self._check_part(key, data)
        self.num_looks += 1

    def look_at_everything(self) -> None:
        """Look once more, and read every commit, manifest and part that ever was named."""
        self._etags.clear()
        self.look()

    def _check_part(self, key: str, data: bytes) -> None:
        record = json.loads(data)
        if not key.startswith(keys.COMMITS) or record["tombstone"]:
            return
        part = record["part"]
        try:
            if digest_of(self._run.get(part["key"])) != part["sha256"]:
                self.wrong.append(f"{key}: its part is not what it promises")
        except NotFound:
            self.wrong.append(f"{key}: its part is not there")

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.look()
            except StorageError:
                continue  # the store is away


def is_final(key: str) -> bool:
    """Whether this object may never change once it is there."""
    return keys.parse_commit(key) is not None or keys.parse_manifest(key) is not None


def check_run(store: ObjectStore, num_rows: int) -> tuple[list[str], pa.Table]:
    """Return what is wrong with a published run, and every row a reader of `completions/` finds."""
    wrong: list[str] = []
    current = _current_commits(store, wrong)
    tables = []
    position = 0
    for shard_id in sorted(current):
        record = current[shard_id]
        key = keys.completions(shard_id)
        data = store.get(key)
        if digest_of(data) != record["part"]["sha256"]:
            wrong.append(f"{key}: not the part of revision {record['revision']}")
        table = pq.read_table(io.BytesIO(data))
        if record["row_start"] != position:
            wrong.append(f"{key}: begins at row {record['row_start']} after row {position}")
        position = record["row_end"]
        if table.column("row_index").to_pylist() != list(range(record["row_start"], position)):
            wrong.append(f"{key}: its rows are not those of its commit, each once and in order")
        if Counter(table.column("state").to_pylist()) != Counter(record["counts"]):
            wrong.append(f"{key}: rows by state are not those of its commit")
        tables.append(table)
    if position != num_rows:
        wrong.append(f"{position} rows committed, {num_rows} given")
    strangers = {info.key for info in store.list(keys.COMPLETIONS)}
    strangers -= {keys.completions(shard_id) for shard_id in current}
    wrong += [f"{key}: of no commit" for key in sorted(strangers)]
    table = pa.concat_tables(tables)
    _check_manifest(store, current, table, wrong)
    return wrong, table


def _current_commits(store: ObjectStore, wrong: list[str]) -> dict[int, dict[str, Any]]:
    current: dict[int, dict[str, Any]] = {}
    attempts = set()
    for info in store.list(keys.COMMITS):
        record = json.loads(store.get(info.key))
        name = (record["shard_id"], record["attempt"])
        if name in attempts:
            wrong.append(f"{info.key}: a second commit of attempt {name[1]}")
        attempts.add(name)
        known = current.get(record["shard_id"])
        if known is None or known["revision"] < record["revision"]:
            current[record["shard_id"]] = record
    return current


def _check_manifest(
    store: ObjectStore, current: dict[int, dict[str, Any]], table: pa.Table, wrong: list[str]
) -> None:
    revisions = [keys.parse_manifest(info.key) or 0 for info in store.list("manifest")]
    manifest = json.loads(store.get(keys.manifest(max(revisions))))
    counts = Counter(table.column("state").to_pylist())
    if Counter(manifest["counts"]) != counts or manifest["num_rows"] != table.num_rows:
        wrong.append(f"manifest: {manifest['counts']}, the parts have {dict(counts)}")
    parts = {part["shard_id"]: part["sha256"] for part in manifest["parts"]}
    if parts != {shard_id: record["part"]["sha256"] for shard_id, record in current.items()}:
        wrong.append("manifest: its parts are not the committed ones")
