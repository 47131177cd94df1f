"""Answers of earlier runs, copied instead of generated: `reuse_from` in the job.

    index    the digests of every `ok` row of the runs named, sorted; 24 bytes for each
    locate   digests -> places in committed parts
    fetch    places -> result columns, from parts that are checked against their commits

Whatever cannot be read is generated, as if it had never been there: reuse saves time, and nothing rests
on it. Truncated and failed rows have no digest, so they are never found.
"""

import logging
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from storage import keys, records
from storage.answers import NUM_BYTES, answers_key, read_answers
from storage.commits import current_commits
from storage.errors import BadInput, CorruptObject, NotFound
from storage.manifest import CommitRecord, digest, file_digest
from storage.many import get_many
from storage.object_store import ObjectStore, StorageConfig, open_store
from tasks.content import answer_digest, engine_digest, engine_fields
from tasks.history import read_history
from tasks.job import RunConfig
from tasks.results import ResultColumns, SampleResult, stored_sample
from tasks.run_record import planned, read_record

log = logging.getLogger("nightjar.reuse")

LAST = "last"
_DIGEST = f"S{NUM_BYTES}"
_CACHE_BYTES = (
    4 << 30
)  # of parts kept on this machine; a shuffled input asks for all of them again and again
_ROW_BITS = 32  # a place is the number of its part, and the position in it


class _Part(NamedTuple):
    store: ObjectStore
    commit: CommitRecord


@dataclass(slots=True)
class ReuseIndex:
    """Every answer that can be reused. `fetch` is for one thread at a time; `locate` for any."""

    engine: bytes
    """Of the run that reuses: see `tasks.content`."""

    columns: ResultColumns
    folder: Path
    """For parts; removed by `close`."""

    uris: list[str] = field(default_factory=list)
    """The runs that can give answers."""

    notes: list[str] = field(default_factory=list)
    """Why a run that was named gives none."""

    _parts: list[_Part] = field(default_factory=list)
    _digests: Any = field(default_factory=lambda: np.zeros(0, _DIGEST))
    _places: Any = field(default_factory=lambda: np.zeros(0, np.int64))
    _cached: "OrderedDict[int, Path | None]" = field(default_factory=OrderedDict)

    @property
    def num_answers(self) -> int:
        """Different answers that can be found."""
        return len(self._digests)

    @property
    def num_bytes(self) -> int:
        """Memory that the index takes."""
        return int(self._digests.nbytes + self._places.nbytes)

    def locate(self, answers: Sequence[bytes]) -> list[int]:
        """Return the place of each answer; -1 where there is none."""
        if not answers or not len(self._digests):
            return [-1] * len(answers)
        wanted = np.array(answers, _DIGEST)
        at = np.minimum(np.searchsorted(self._digests, wanted), len(self._digests) - 1)
        found: list[int] = np.where(self._digests[at] == wanted, self._places[at], -1).tolist()
        return found

    def num_known(self, rows: Sequence[bytes], num_samples: int) -> list[int]:
        """Return for each row, by its own digest, how many of its samples can be found."""
        answers = [answer_digest(self.engine, row, i) for row in rows for i in range(num_samples)]
        found = np.array(self.locate(answers), np.int64).reshape(len(rows), num_samples) >= 0
        counts: list[int] = found.sum(axis=1).tolist()
        return counts

    def fetch(self, places: Sequence[int]) -> Iterator[tuple[int, SampleResult]]:
        """Yield what stands at the places, part by part; those that cannot be read are left out."""
        wanted = np.unique(np.asarray(places, np.int64))
        ordinals = wanted >> _ROW_BITS
        for ordinal in np.unique(ordinals).tolist():
            path = self._path(ordinal)
            if path is None:
                continue
            positions = wanted[ordinals == ordinal] & ((1 << _ROW_BITS) - 1)
            for position, row in _rows(path, positions.tolist(), self.columns):
                # The digest says it was ok; the part has the last word.
                if row["state"] == records.OK:
                    yield ordinal << _ROW_BITS | position, stored_sample(row)

    def close(self) -> None:
        """Remove what was downloaded. Safe to repeat."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._cached.clear()

    def add(self, store: ObjectStore, commits: Sequence[CommitRecord]) -> int:
        """Take the answers of a run's commits in; return how many there are."""
        told = [commit for commit in commits if commit.receipt.get("answers")]
        found = [self._digests]
        places = [self._places]
        for commit, data in zip(told, get_many(store, map(answers_key, told)), strict=True):
            if data is None:
                continue
            source = f"{store.uri}/{answers_key(commit)}"
            try:
                column = read_answers(data, sha256=commit.receipt["answers"], source=source)
            except CorruptObject as error:
                log.warning("%s; its rows are generated", error)
                continue
            valid = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
            every = np.frombuffer(
                column.buffers()[1], _DIGEST, len(column), NUM_BYTES * column.offset
            )
            found.append(every[valid])
            places.append(valid.astype(np.int64) | len(self._parts) << _ROW_BITS)
            self._parts.append(_Part(store, commit))
        self._digests, first = np.unique(np.concatenate(found), return_index=True)
        self._places = np.concatenate(places)[first]
        return sum(map(len, found[1:]))

    def _path(self, ordinal: int) -> Path | None:
        """Return the part on this machine; None if it is not the one that was committed, or gone."""
        if ordinal in self._cached:
            self._cached.move_to_end(ordinal)
            return self._cached[ordinal]
        store, commit = self._parts[ordinal]
        path = self.folder / f"{ordinal:05d}.parquet"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(commit.part.size)
        try:
            store.download(commit.part.key, path)
        except NotFound:
            log.warning("%s/%s: gone; its rows are generated", store.uri, commit.part.key)
            self._cached[ordinal] = None
            return None
        is_right = file_digest(path) == commit.part.sha256
        if not is_right:
            log.warning("%s/%s: damaged; its rows are generated", store.uri, commit.part.key)
        self._cached[ordinal] = path if is_right else None
        return self._cached[ordinal]

    def _make_room(self, num_bytes: int) -> None:
        sizes = {o: self._parts[o].commit.part.size for o, path in self._cached.items() if path}
        while sizes and sum(sizes.values()) + num_bytes > _CACHE_BYTES:
            oldest = next(iter(sizes))
            path = self._cached.pop(oldest)
            if path is not None:
                path.unlink(missing_ok=True)
            del sizes[oldest]


def named_runs(job: RunConfig) -> list[str]:
    """Return the run folders a job names; `last` is the latest in its history that is still there."""
    named = [job.reuse_from] if isinstance(job.reuse_from, str) else list(job.reuse_from or [])
    found = []
    for uri in named:
        found += [uri.rstrip("/")] if uri != LAST else _last_run(job)
    return found


def _last_run(job: RunConfig) -> list[str]:
    for past in reversed([run for run in read_history(job).runs if run.run_uri]):
        try:
            read_record(open_store(past.run_uri, job.storage))
        except BadInput as error:
            log.info("%s", error)  # somebody has tidied up
        else:
            return [past.run_uri]
    return []


def open_reuse(
    uris: Sequence[str],
    fields: dict[str, Any],
    *,
    storage: StorageConfig,
    folder: Path,
    own_uri: str | None = None,
) -> ReuseIndex:
    """Read what the runs named can give a run with these fingerprint fields.

    A run on another engine gives nothing, and a note says why.

    Raises:
        BadInput: a folder is not a planned run's.
    """
    columns = ResultColumns(
        token_ids=bool(fields["output.token_ids"]), logprobs=fields["sampling.logprobs"] is not None
    )
    index = ReuseIndex(engine_digest(fields), columns, folder)
    for uri in uris:
        if uri == own_uri:
            continue
        store = open_store(uri, storage)
        reason = _add(index, store, fields)
        if reason is None:
            index.uris.append(uri)
        else:
            index.notes.append(f"reuse_from {uri}: {reason}; nothing of it is reused")
    return index


def _add(index: ReuseIndex, store: ObjectStore, fields: dict[str, Any]) -> str | None:
    try:
        theirs = read_record(store).fingerprint_fields
        planned(store)
    except BadInput as error:
        raise BadInput(f"reuse_from: {error}") from None
    ours = engine_fields(fields)
    differing = sorted(n for n, v in ours.items() if engine_fields(theirs).get(n) != v)
    if differing:
        return f"it has another {', '.join(differing)}"
    if index.columns.token_ids and not theirs.get("output.token_ids"):
        return "it kept no token ids, and output.token_ids asks for them"
    commits = current_commits(store, digest(store.get(keys.PLAN)))
    if not index.add(store, list(commits.values())):
        return "it holds no answer that can be known again"
    return None


def _rows(
    path: Path, positions: list[int], columns: ResultColumns
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the result columns of rows at ascending positions; only row groups that have one are read."""
    names = [f.name for f in columns.fields]
    with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
        start, left = 0, list(reversed(positions))
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            if left and left[-1] < end:
                for batch in file.iter_batches(1024, row_groups=[group], columns=names):
                    mine = []
                    while left and left[-1] < start + batch.num_rows:
                        mine.append(left.pop())
                    rows = batch.take([position - start for position in mine]).to_pylist()
                    yield from zip(mine, rows, strict=True)
                    start += batch.num_rows
            start = end
