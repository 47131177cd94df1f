"""Models on the Hugging Face Hub: `hf://org/repo@revision`.

A revision is resolved to a commit once per node and the answer is kept in a file, so that forty
replicas that start together ask once. Files come through huggingface_hub (and hf-xet where the repo
has it); it compares sizes only, so their SHA-256 or Git digest is compared here.
"""

import fcntl
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO, TypeVar

from storage import weight_files
from storage.checksums import GIT_BLOB, SHA256, Checksum, file_checksum
from storage.disk_space import NO_SPACE, no_space
from storage.errors import (
    AccessDenied,
    BadInput,
    CorruptObject,
    NotFound,
    StorageError,
    StoreUnavailable,
)
from storage.stage_sources import SourceFile

PIN_TTL_S = 3600.0
"""A branch or tag is looked up again after this long; a commit never is."""

WORK_FOLDER = ".work"
"""Inside the model's folder while it is staged: what huggingface_hub and converters leave behind."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PASSING = {408, 409, 429, 500, 502, 503, 504}
_MAX_ATTEMPTS = 6
_MAX_WAIT_S = 120.0
_THREADS = 8

Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """One commit of one repository."""

    repo_id: str
    commit: str
    files: list[SourceFile]

    @property
    def uri(self) -> str:
        return f"hf://{self.repo_id}@{self.commit}"

    @property
    def identity(self) -> str:
        return self.uri

    def list_files(self) -> list[SourceFile]:
        return list(self.files)

    def download(
        self,
        files: list[SourceFile],
        folder: Path,
        *,
        on_bytes: Callable[[int], None],
        on_file: Callable[[Path], None],
    ) -> dict[str, Checksum]:
        """Download files into `folder`, each under its name only once verified; resumes what is there.

        Raises:
            CorruptObject: a file is not what the Hub promises; what came of it is deleted.
            StoreUnavailable: the Hub did not answer properly, even after bounded retries.
        """

        def one(file: SourceFile) -> tuple[str, Checksum]:
            found = self._download(file, folder)
            on_bytes(file.size)
            on_file(folder / file.name)
            return file.name, found

        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(pool.map(one, files))

    def read_range(self, file: SourceFile, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file at this commit. Raises NotFound, AccessDenied, StoreUnavailable."""
        from huggingface_hub import hf_hub_url

        utils: Any = import_module("huggingface_hub.utils")
        what = f"{self.uri} {file.name}"
        url = hf_hub_url(self.repo_id, file.name, revision=self.commit, endpoint=_endpoint())
        headers = {**utils.build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}

        def request() -> bytes:
            reply = utils.get_session().get(url, headers=headers, timeout=30, follow_redirects=True)
            utils.hf_raise_for_status(reply)
            return bytes(reply.content)

        data = _bounded(request, what)
        if len(data) != end - start:
            raise StoreUnavailable(f"{what}: asked for {end - start} bytes, {len(data)} came")
        return data

    def _download(self, file: SourceFile, folder: Path) -> Checksum:
        assert file.checksum is not None, f"{file.name} was listed without a digest"
        target = weight_files.safe_path(folder, file.name)
        if target.exists() and file_checksum(target, file.checksum.algorithm) == file.checksum:
            return file.checksum
        try:
            path = self._fetch(file, folder / WORK_FOLDER)
        except OSError as error:
            raise no_space(folder, file.size) from error
        found = file_checksum(path, file.checksum.algorithm)
        try:
            if path.stat().st_size != file.size or found != file.checksum:
                raise CorruptObject(
                    f"{self.uri} {file.name}: the Hub promises {file.size} bytes with "
                    f"{file.checksum}, {path.stat().st_size} bytes with {found} came; "
                    "they were deleted; stage again"
                )
            if weight_files.is_weights(file.name):
                weight_files.check_safetensors(path, name=file.name)
        except CorruptObject:
            path.unlink()
            raise
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("rb") as written:
            os.fsync(written.fileno())
        path.rename(target)
        return found

    def _fetch(self, file: SourceFile, work: Path) -> Path:
        """Let huggingface_hub download a file below `work`. Raises OSError when the disk is full."""
        from huggingface_hub import hf_hub_download

        def request() -> str:
            path: str = hf_hub_download(
                self.repo_id,
                file.name,
                revision=self.commit,
                local_dir=work,
                # Not the user's cache: what is damaged there would be copied again and again.
                cache_dir=work / "cache",
                endpoint=_endpoint(),
                tqdm_class=_silent_bar(),
            )
            return path

        return Path(_bounded(request, f"{self.uri} {file.name}"))


def _endpoint() -> str | None:
    """A mirror of the Hub, as huggingface_hub's own variable names it."""
    return os.environ.get("HF_ENDPOINT") or None


def _silent_bar() -> Any:
    """A progress bar class for huggingface_hub that draws nothing: progress is reported by file."""
    bar: Any = import_module("tqdm").tqdm

    def make_silent(self: Any, *args: Any, name: str = "", **kwargs: Any) -> None:
        bar.__init__(self, *args, **{**kwargs, "disable": True})

    return type("Silent", (bar,), {"__init__": make_silent})


def open_hub(source: str, pins: Path, *, ttl_s: float = PIN_TTL_S) -> HubSource:
    """Resolve `hf://org/repo@revision`, asking the Hub at most once per node and `ttl_s`.

    Args:
        pins: a folder of this node and user, shared by its processes.

    Raises:
        BadInput: the source has another form.
        NotFound, AccessDenied, StoreUnavailable: as the Hub answered, to us or to who asked for us.
    """
    repo_id, _, revision = source.removeprefix("hf://").partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", repo_id):
        raise BadInput(f"{source}: not of the form hf://org/repo@revision")
    revision = revision or "main"
    began_at = time.time()
    name = hashlib.sha256(f"{_endpoint()}|{repo_id}|{revision}".encode()).hexdigest()[:32]
    pin = pins / f"{name}.json"
    with pin.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        kept = _read_pin(file)
        if kept.get("failed_at", 0.0) >= began_at:
            # Somebody asked for us while we waited: asking again would only add to the storm.
            raise StoreUnavailable(kept["error"])
        age_s = began_at - kept.get("resolved_at", 0.0)
        if "commit" in kept and (age_s < ttl_s or _COMMIT.fullmatch(revision)):
            return _unpinned(repo_id, kept)
        try:
            value = _resolve(repo_id, revision)
        except StoreUnavailable as error:
            _write_pin(file, {"failed_at": time.time(), "error": str(error)})
            raise
        _write_pin(file, value)
    return _unpinned(repo_id, value)


def _resolve(repo_id: str, revision: str) -> dict[str, Any]:
    from huggingface_hub import HfApi

    what = f"hf://{repo_id}@{revision}"
    api = HfApi(endpoint=_endpoint())
    info = _bounded(
        lambda: api.model_info(repo_id, revision=revision, files_metadata=True, timeout=30),
        what,
    )
    files = []
    for sibling in info.siblings or []:
        if sibling.size is None or not (sibling.lfs or sibling.blob_id):
            raise StoreUnavailable(
                f"{what}: the Hub lists {sibling.rfilename} without size or digest"
            )
        digest = (SHA256, sibling.lfs.sha256) if sibling.lfs else (GIT_BLOB, sibling.blob_id)
        files.append([sibling.rfilename, sibling.size, *digest])
    return {"commit": info.sha, "files": files, "resolved_at": time.time()}


def _unpinned(repo_id: str, value: dict[str, Any]) -> HubSource:
    files = [
        SourceFile(
            name=name,
            size=size,
            etag=digest,
            checksum=Checksum(algorithm, digest),
            promised_by="the Hub",
        )
        for name, size, algorithm, digest in value["files"]
    ]
    return HubSource(repo_id=repo_id, commit=value["commit"], files=files)


def _write_pin(file: TextIO, value: dict[str, Any]) -> None:
    file.seek(0)
    file.truncate()
    json.dump(value, file)
    file.flush()


def _read_pin(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        value = json.load(file)
    except ValueError:  # new, or its writer died: ask again
        return {}
    return value if isinstance(value, dict) else {}


def _bounded(request: Callable[[], Reply], what: str) -> Reply:
    """Ask a bounded number of times, waiting as long as the Hub says."""
    errors: Any = import_module("huggingface_hub.errors")

    waited_s = 0.0
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        try:
            return request()
        except errors.HfHubHTTPError as error:
            fault = _from_reply(error, what)
            wait_s = _retry_after_s(error, attempt)
        except (OSError, errors.HTTPError) as error:  # HTTPError: no answer at all
            if getattr(error, "errno", None) in NO_SPACE:
                raise
            fault = StoreUnavailable(f"{what}: {type(error).__name__}: {error}")
            wait_s = _backoff_s(attempt)
        waited_s += wait_s
        if not fault.retryable or attempt == _MAX_ATTEMPTS or waited_s > _MAX_WAIT_S:
            break
        time.sleep(wait_s)
    later = ": try again when the Hub can be reached, or give a local folder"
    raise type(fault)(f"{fault}; asked {attempt} times{later if fault.retryable else ''}")


def _retry_after_s(error: Any, attempt: int) -> float:
    header = error.response.headers.get("Retry-After", "") if error.response is not None else ""
    return float(header) + random.uniform(0, 0.5) if header.isdigit() else _backoff_s(attempt)


def _backoff_s(attempt: int) -> float:
    return random.uniform(0.5, 1.0) * min(15.0, 0.5 * 2.0 ** (attempt - 1))


def _from_reply(error: Any, what: str) -> StorageError:
    status = error.response.status_code if error.response is not None else 0
    said = str(error).splitlines()[0]
    if status == 404:
        return NotFound(f"{what}: no such repository, revision or file ({said})")
    if status in (401, 403):
        return AccessDenied(f"{what}: {said}; accept its licence or set HF_TOKEN")
    if status in _PASSING or status == 0:
        return StoreUnavailable(f"{what}: the Hub answers {status}: {said}")
    return BadInput(f"{what}: the Hub refuses: {status}: {said}")
