"""An inbox: a prefix where files are dropped, and four folders that say how far each has come.

    inbox/prompts.parquet                 dropped; left alone until nobody writes it any more
    inbox/prompts.parquet.yaml            optional: settings over the inbox's job, and `after`
    accepted/ID/prompts.parquet           the file, at its place for good
    accepted/ID/preflight.md, .json       the letter
    accepted/ID/job.yaml                  the job that was made of it
    rejected/ID/prompts.parquet, preflight.md, .json
    done/ID/result.json, result.md        published: where the results are

ID names the file and its content: the same file twice is the same ID, and a no-op. Every step may be
repeated: the file leaves `inbox/` last.
"""

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from storage import formats
from storage.errors import BadInput, NotFound
from storage.inputs import InputFiles
from storage.manifest import to_json
from storage.object_store import ObjectInfo, ObjectStore, StorageConfig, open_store
from storage.reveal import read_manifest
from tasks.deadline import next_time
from tasks.job import RunConfig
from tasks.letter import Letter, letter_for

log = logging.getLogger("nightjar.inbox")

DROPPED, ACCEPTED, REJECTED, DONE = "inbox/", "accepted/", "rejected/", "done/"
LETTER, LETTER_JSON, JOB, RESULT, RESULT_TEXT = (
    "preflight.md", "preflight.json", "job.yaml", "result.json", "result.md",
)  # fmt: skip
SIDECAR = ".yaml"
KEEP = f"{DROPPED}.keep"
SETTLE_S = 10.0
"""A local file that changed more recently may still be being written. Objects in S3 come whole."""


class Jobs(Protocol):
    """Reads and writes job files; its errors are ValueErrors of one line."""

    def settings(self, data: bytes) -> dict[str, Any]:
        """Read the settings beside a file."""

    def job(self, settings: dict[str, Any]) -> RunConfig:
        """Put settings over the inbox's own job."""

    def dump(self, job: RunConfig) -> bytes:
        """Write a job file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A file that was accepted and is not done."""

    submission_id: str
    job_uri: str
    after: datetime | None
    """Not to be started before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What one look at the inbox did."""

    accepted: list[str]
    rejected: list[str]
    done: list[str]
    waiting: list[str]
    """Names of dropped files that may still be being written."""

    queued: list[Submission]
    """Accepted and not done, those of earlier scans included."""


def scan(
    inbox: ObjectStore,
    *,
    storage: StorageConfig,
    jobs: Jobs,
    work_dir: Path,
    now: datetime,
    settle_s: float = SETTLE_S,
) -> Scan:
    """Look once: judge what was dropped, move it on, and note what is published.

    Args:
        inbox: The root above `inbox/`, `accepted/`, `rejected/` and `done/`.
        storage: How to reach it.
        jobs: Makes jobs of the inbox's own and the settings beside a file.
        work_dir: Scratch.
        now: The present, with a time zone.
        settle_s: How long a local file must have been left alone.

    Raises:
        StorageError, InferenceError: the store or the model is at fault; nothing is rejected for it.
    """
    accepted: list[str] = []
    rejected: list[str] = []
    waiting: list[str] = []
    files = InputFiles(work_dir, storage)
    _keep_folder(inbox)
    for info in _dropped(inbox):
        name = info.key.removeprefix(DROPPED)
        if not _is_settled(inbox, info, settle_s):
            waiting.append(name)
            continue
        (found,) = files.expand(f"{inbox.uri}/{info.key}")
        drop = _Drop(name=name, key=info.key, etag=found.etag, store_etag=info.etag)
        verdict = _judge(inbox, drop, jobs, work_dir, now)
        (accepted if verdict else rejected).append(name)
    done, queued = _follow(inbox, storage)
    return Scan(accepted=accepted, rejected=rejected, done=done, waiting=waiting, queued=queued)


def submit(
    inbox: ObjectStore, file: Path, *, settings: dict[str, Any] | None, after: str | None
) -> str:
    """Drop a file with its settings; return its key. The settings come first, so none is missed."""
    key = f"{DROPPED}{file.name}"
    sidecar = {**(settings or {}), **({"after": after} if after is not None else {})}
    if sidecar:
        inbox.put(key + SIDECAR, to_json(sidecar))
    inbox.upload(file, key)
    return key


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drop:
    name: str
    key: str
    etag: str
    store_etag: str

    @property
    def submission_id(self) -> str:
        content = hashlib.sha256(f"{self.name}\0{self.etag}".encode()).hexdigest()[:12]
        return f"{_slug(PurePosixPath(self.name).name.split('.')[0])}-{content}"

    def at(self, state: str, name: str) -> str:
        return f"{state}{self.submission_id}/{name}"

    @property
    def file_name(self) -> str:
        return PurePosixPath(self.name).name


def is_wanted(name: str) -> bool:
    """Whether an inbox takes a file of this name, or leaves it where it is."""
    # As everywhere: a leading dot or underscore hides a file, such as one being written.
    is_hidden = any(part.startswith((".", "_")) for part in name.split("/"))
    return not is_hidden and not name.endswith(SIDECAR) and formats.by_name(name) is not None


def _dropped(inbox: ObjectStore) -> Iterator[ObjectInfo]:
    for info in list(inbox.list(DROPPED)):
        if is_wanted(info.key.removeprefix(DROPPED)):
            yield info


def _is_settled(inbox: ObjectStore, info: ObjectInfo, settle_s: float) -> bool:
    if inbox.uri.startswith("s3://"):
        return True
    if time.time() - info.modified_at < settle_s:
        return False
    try:
        return inbox.head(info.key).etag == info.etag
    except NotFound:
        return False


def _judge(
    inbox: ObjectStore,
    drop: _Drop,
    jobs: Jobs,
    work_dir: Path,
    now: datetime,
) -> bool:
    """Write the letter and move the file on; True when it is accepted."""
    if _exists(inbox, drop.at(ACCEPTED, LETTER_JSON)):
        log.info("submission=%s is known; dropped again", drop.submission_id)
        _leave(inbox, drop)
        return True
    # One that was rejected is judged anew: its settings, or the inbox's, may be right now.
    letter, job = _letter(inbox, drop, jobs, work_dir, now)
    state = REJECTED if job is None else ACCEPTED
    inbox.copy(drop.key, drop.at(state, drop.file_name))
    if job is not None:
        inbox.put(drop.at(state, JOB), jobs.dump(job))
        for info in list(inbox.list(drop.at(REJECTED, ""))):
            inbox.delete(info.key)
    inbox.put(drop.at(state, LETTER), letter.to_markdown())
    inbox.put(drop.at(state, LETTER_JSON), letter.to_json())  # last: now it is judged
    log.info("submission=%s %s", drop.submission_id, state.rstrip("/"))
    _leave(inbox, drop)
    return letter.is_accepted


def _letter(
    inbox: ObjectStore, drop: _Drop, jobs: Jobs, work_dir: Path, now: datetime
) -> tuple[Letter, RunConfig | None]:
    refused = Letter(file=drop.name, etag=drop.etag, is_accepted=False, reason="")
    try:
        settings, after = _sidecar(inbox, drop, jobs)
        job = jobs.job(_job_settings(settings, f"{inbox.uri}/{drop.key}", drop.submission_id))
        starts = None if after is None else next_time(after, timezone=job.timezone, now=now)
    except (ValueError, BadInput) as error:
        return dataclasses.replace(refused, reason=f"{drop.name}{SIDECAR}: {error}"), None
    letter = letter_for(job, file=drop.name, etag=drop.etag, work_dir=work_dir, now=starts or now)
    if not letter.is_accepted:
        return letter, None
    final = jobs.job(
        _job_settings(
            settings, f"{inbox.uri}/{drop.at(ACCEPTED, drop.file_name)}", drop.submission_id
        )
    )
    run_uri = f"{final.output.uri.rstrip('/')}/{final.run_id}"
    queued_for = None if starts is None else starts.isoformat(timespec="seconds")
    return dataclasses.replace(letter, run_uri=run_uri, queued_for=queued_for), final


def _sidecar(inbox: ObjectStore, drop: _Drop, jobs: Jobs) -> tuple[dict[str, Any], str | None]:
    try:
        data = inbox.get(drop.key + SIDECAR)
    except NotFound:
        return {}, None
    settings = jobs.settings(data)
    after = settings.pop("after", None)
    return settings, None if after is None else str(after)


def _job_settings(settings: dict[str, Any], uri: str, submission_id: str) -> dict[str, Any]:
    given = settings.get("input") or {}
    return {**settings, "input": {**given, "uri": uri}, "run_id": submission_id}


def _follow(inbox: ObjectStore, storage: StorageConfig) -> tuple[list[str], list[Submission]]:
    """Note the submissions that are published since the last look; return those that are not."""
    done, queued = [], []
    finished = {info.key.split("/")[1] for info in inbox.list(DONE)}
    for info in list(inbox.list(ACCEPTED)):
        _, submission_id, name = info.key.split("/", 2)
        if name != LETTER_JSON or submission_id in finished:
            continue
        letter = json.loads(inbox.get(info.key))
        job_key = f"{ACCEPTED}{submission_id}/{JOB}"
        manifest = read_manifest(open_store(letter["run_uri"], storage))
        if manifest is None:
            after = letter["queued_for"]
            queued.append(
                Submission(
                    submission_id=submission_id,
                    job_uri=f"{inbox.uri}/{job_key}",
                    after=None if after is None else datetime.fromisoformat(after),
                )
            )
            continue
        result = {
            "file": letter["file"],
            "run": letter["run_uri"],
            "completions": f"{letter['run_uri']}/completions/",
            "rows_by_state": manifest.counts,
            "published_at": manifest.published_at,
        }
        counts = ", ".join(f"{count:,} {state}" for state, count in manifest.counts.items())
        text = f"# {letter['file']}: done\n\n- rows: {counts}\n- results: {result['completions']}\n"
        inbox.put(f"{DONE}{submission_id}/{RESULT_TEXT}", text.encode())
        inbox.put(f"{DONE}{submission_id}/{RESULT}", to_json(result))
        done.append(submission_id)
    return done, queued


def _leave(inbox: ObjectStore, drop: _Drop) -> None:
    """Remove the dropped file if it is still the one that was judged."""
    try:
        if inbox.head(drop.key).etag != drop.store_etag:
            return
    except NotFound:
        return
    inbox.delete(drop.key)
    inbox.delete(drop.key + SIDECAR)


def _keep_folder(inbox: ObjectStore) -> None:
    """See to it that a local `inbox/` outlives its last file, for whoever copies another into it."""
    if not inbox.uri.startswith("s3://") and not _exists(inbox, KEEP):
        inbox.put(KEEP, b"")


def _exists(store: ObjectStore, key: str) -> bool:
    try:
        store.head(key)
    except NotFound:
        return False
    return True


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:40] or "file"
