"""Fill a model's folder: small files, checks, room, weights, and last of all its MANIFEST.json.

Runs in the one process that holds the model's stage lock. Whatever happens before the last step, the
folder is partial, and says so by having no manifest.
"""

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from storage.cache_room import make_room
from storage.checksums import CRC64NVME, Checksum, file_checksum
from storage.disk_space import NO_SPACE, no_space, used_bytes
from storage.errors import BadInput
from storage.hub_source import WORK_FOLDER, HubSource
from storage.local_source import LocalSource
from storage.model_cache import ModelCache
from storage.model_listing import Listing, with_promises
from storage.model_manifest import ModelManifest, StagedFile
from storage.partial_file import JOURNAL_SUFFIX
from storage.ranged_copy import RangedCopy, sync_folder
from storage.s3_client import RetryPolicy
from storage.stage_report import PhaseTimer
from storage.stage_sources import SourceFile
from storage.weight_files import MANIFEST, check_safetensors, check_small_files, is_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class FillOptions:
    """How a model is copied, whatever its source."""

    allowed_code: frozenset[str] = frozenset()
    """SHA-256 of config files that may name Python classes."""

    convert_gguf: Callable[[Path, Path], object] | None = None
    """(GGUF file, folder to create) -> a model folder with safetensors."""

    gguf_dtype: str = ""
    """Of those safetensors."""

    num_threads: int = 8
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    on_ready: Callable[[Path], None] = lambda folder: None
    on_file: Callable[[Path], None] = lambda path: None
    on_progress: Callable[[int, int], None] = lambda done, total: None


@dataclass(slots=True)
class Filled:
    """What it took."""

    bytes_moved: int = 0
    bytes_resumed: int = 0
    huge_bytes: int = 0
    num_retries: int = 0
    thread_s: dict[str, float] = field(default_factory=dict)
    evicted: list[str] = field(default_factory=list)


class Fill:
    """One filling of one model's folder in one cache."""

    def __init__(
        self,
        listing: Listing,
        cache: ModelCache,
        *,
        direct: bool,
        budget_bytes: int | None,
        options: FillOptions,
        timer: PhaseTimer,
    ) -> None:
        self._listing = listing
        self._cache = cache
        self._folder = cache.path(listing.content_id)
        self._is_direct = direct
        self._budget_bytes = budget_bytes
        self._options = options
        self._timer = timer
        self._checksums: dict[str, Checksum] = {}
        self._done_bytes = 0
        self._lock = threading.Lock()
        self._is_ready = ExitStack()
        self.filled = Filled()

    def run(self) -> Filled:
        """Copy, check and publish; raises as `stage_model` does, with nothing published."""
        with self._is_ready:
            return self._run()

    def _run(self) -> Filled:
        self._start()
        with self._timer("describe"):
            files = with_promises(self._listing)
        with self._timer("allocate"), self._cache.reserve():
            self._make_room()
        staged = self._convert(*files) if self._listing.is_gguf else self._copy_model(files)
        with self._timer("publish"):
            self._publish(staged)
        return self.filled

    def _copy_model(self, files: list[SourceFile]) -> list[StagedFile]:
        weights = [file for file in files if is_weights(file.name)]
        small = [file for file in files if not is_weights(file.name)]
        self._copy(self._folder, small)
        needed = check_small_files(
            self._folder,
            [file.name for file in files],
            source=self._listing.source.uri,
            allowed_code=self._options.allowed_code,
        )
        wanted = [file for file in weights if file.name in needed]
        self._copy(self._folder, wanted, on_ready=self._tell_ready)
        return [self._describe(file) for file in (*small, *wanted)]

    def _tell_ready(self) -> None:
        """Tell those who wait for this model in other processes, and our own caller."""
        self._is_ready.enter_context(self._cache.tell_ready(self._listing.content_id))
        self._options.on_ready(self._folder)

    def _convert(self, file: SourceFile) -> list[StagedFile]:
        """Unpack a GGUF file into a model folder, next to the copy of it where it is not local."""
        convert, source = self._options.convert_gguf, self._listing.source
        if convert is None:
            raise BadInput(
                f"{source.uri}: a GGUF file must be converted, and no converter was given"
            )
        if isinstance(source, LocalSource):
            path = source.path
        else:
            self._copy(self._folder / WORK_FOLDER, [file])
            path = self._folder / WORK_FOLDER / file.name
        unpacked = self._folder / WORK_FOLDER / "unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)  # of a conversion that died
        with self._timer("convert"):
            try:
                convert(path, unpacked)
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                raise no_space(self._folder, self._listing.staged_bytes) from error
        if isinstance(source, LocalSource):
            source.refuse_change(file)
        return [self._adopt(found, file) for found in sorted(unpacked.iterdir())]

    def _adopt(self, unpacked: Path, origin: SourceFile) -> StagedFile:
        """Take over one file that the converter wrote."""
        if is_weights(unpacked.name):
            check_safetensors(unpacked, name=unpacked.name)
        self._checksums[unpacked.name] = file_checksum(unpacked, CRC64NVME.name)
        with unpacked.open("rb") as written:
            os.fsync(written.fileno())
        unpacked.rename(self._folder / unpacked.name)
        self._options.on_file(self._folder / unpacked.name)
        size = (self._folder / unpacked.name).stat().st_size
        return self._describe(SourceFile(name=unpacked.name, size=size, etag=origin.etag))

    def _start(self) -> None:
        """Begin where an earlier try ended; begin anew if the model was whole and touched since."""
        if (self._folder / MANIFEST).exists():
            # Removed, not rewritten: whoever still reads those files keeps what he opened.
            shutil.rmtree(self._folder)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if isinstance(self._listing.source, HubSource):
            self._listing.source.clear(self._folder)

    def _copy(
        self,
        folder: Path,
        files: list[SourceFile],
        *,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy files; `on_ready` is told when room for them is reserved, where that can be done."""
        source = self._listing.source
        if isinstance(source, HubSource):
            on_ready()
            with self._timer("transfer"):
                self._checksums |= source.download(
                    files, folder, on_bytes=self._count, on_file=self._options.on_file
                )
            self.filled.bytes_moved += sum(file.size for file in files)
            return
        copy = RangedCopy(
            source,
            folder,
            direct=self._is_direct,
            num_threads=self._options.num_threads,
            retry=self._options.retry,
            on_bytes=self._count,
        )
        try:
            with self._timer("resume"):
                copy.resume(files)
            with self._timer("allocate"), self._cache.reserve():
                self._make_room()
                copy.allocate()
            on_ready()
            with self._timer("transfer"):
                copy.run(self._options.on_file)
        finally:
            copy.close()
            self._add(copy)
        self._checksums |= copy.checksums

    def _add(self, copy: RangedCopy) -> None:
        stats, filled = copy.stats, self.filled
        filled.bytes_moved += stats.bytes_moved
        filled.bytes_resumed += stats.bytes_resumed
        filled.huge_bytes += stats.huge_bytes
        filled.num_retries += stats.num_retries
        for name in ("read_s", "checksum_s", "write_s"):
            seconds = filled.thread_s.get(name.removesuffix("_s"), 0.0)
            filled.thread_s[name.removesuffix("_s")] = round(seconds + getattr(stats, name), 4)

    def _make_room(self) -> None:
        missing = max(0, self._listing.staged_bytes - used_bytes(self._folder))
        self.filled.evicted += make_room(
            self._cache, missing, budget_bytes=self._budget_bytes, keep=self._listing.content_id
        )

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._done_bytes += num_bytes
            self._options.on_progress(self._done_bytes, self._listing.num_bytes)

    def _publish(self, files: list[StagedFile]) -> None:
        for folder in {(self._folder / file.name).parent for file in files} | {self._folder}:
            sync_folder(folder)
        staged = {file.name for file in files}
        left = [file.name for file in self._listing.files if file.name not in staged]
        manifest = ModelManifest(
            content_id=self._listing.content_id,
            source=self._listing.source.uri,
            num_bytes=sum(file.size for file in files),
            files=files,
            skipped=sorted([*self._listing.skipped, *left]),
            staged_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        self._write_last(manifest.to_json())
        for file in files:
            (self._folder / (file.name + JOURNAL_SUFFIX)).unlink(missing_ok=True)
        shutil.rmtree(self._folder / WORK_FOLDER, ignore_errors=True)

    def _describe(self, file: SourceFile) -> StagedFile:
        return StagedFile(
            name=file.name,
            size=file.size,
            checksum=str(self._checksums[file.name]),
            verified_by=file.promised_by,
            mtime_ns=(self._folder / file.name).stat().st_mtime_ns,
        )

    def _write_last(self, data: bytes) -> None:
        """Make the model whole: after this rename, and not before, it is one."""
        partial = self._folder / f".{MANIFEST}"
        try:
            with open(partial, "wb", opener=_owners_alone) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise no_space(self._folder, len(data)) from error
        partial.rename(self._folder / MANIFEST)
        sync_folder(self._folder)


def _owners_alone(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
