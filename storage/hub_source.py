"""Models on the Hugging Face Hub: `hf://org/repo@revision`.

A revision is resolved to a commit once per node and the answer is kept in a file, so that forty
replicas that start together ask once. Files come through huggingface_hub (and hf-xet where the repo
has it); it compares sizes only, so their SHA-256 or Git digest is compared here.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from storage import weight_files
from storage.checksums import GIT_BLOB, SHA256, Checksum, file_checksum
from storage.disk_space import no_space
from storage.errors import BadInput, CorruptObject, StoreUnavailable
from storage.hub_requests import bounded
from storage.stage_sources import SourceFile

PIN_TTL_S = 3600.0
"""A branch or tag is looked up again after this long; a commit never is."""

WORK_FOLDER = ".work"
"""Inside the model's folder while it is staged: what huggingface_hub and converters leave behind."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_THREADS = 8
_LEFTOVER = re.compile(r"\.[0-9a-f]{8}\.incomplete$")
"""Of a download that was killed: its name is that process's own, and no other goes on with it."""


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

    def clear(self, folder: Path) -> None:
        """Delete what a killed download left of files, so that it takes no room; call while none is under way."""
        for path in (folder / WORK_FOLDER).rglob("*.incomplete"):
            if _LEFTOVER.search(path.name):
                path.unlink()

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

        data = bounded(request, what)
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

        return Path(bounded(request, f"{self.uri} {file.name}"))


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
    info = bounded(
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
