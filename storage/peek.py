"""Look at a model without moving its weights: small files whole, and a few places of each weight file.

What is seen belongs to one moment: every read is pinned by the ETag or commit of one listing.
"""

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from storage.errors import BadInput, StoreUnavailable
from storage.hub_source import WORK_FOLDER, HubSource
from storage.model_caches import open_places
from storage.model_listing import Listing, Source, list_model, open_source, with_promises
from storage.object_store import StorageConfig
from storage.ranged_copy import RangedCopy, fill
from storage.s3_client import RetryPolicy
from storage.stage_sources import SourceFile
from storage.weight_files import check_header, check_small_files, header_length, is_weights

MAX_HUB_FILES = 8
"""Weight files of a Hub model that are looked into; more would be thousands of requests to a hub that counts them."""

_FIRST_BYTES = 64 << 10
_THREADS = 16

Spans = Callable[[int, int], Sequence[tuple[int, int]]]
"""(bytes of a weight file, bytes of its header) -> which parts of it to read."""


class Peeked(NamedTuple):
    """A model that was looked at."""

    uri: str
    """As it can be given to every replica: a Hub revision is pinned to its commit."""

    files: Iterator["PeekedFile"]
    """Weight files in the order of their names, each read when it is asked for: together they may be large."""


class PeekedFile(NamedTuple):
    """What was read of one weight file."""

    name: str
    num_bytes: int
    header: bytes
    blocks: list[bytes]


def peek_model(
    source: str,
    folder: Path,
    *,
    config: StorageConfig,
    spans: Spans,
    allowed_code: Collection[str] = (),
    retry: RetryPolicy | None = None,
) -> Peeked | None:
    """Copy a model's small files, verified, into `folder` and read parts of its weight files.

    Returns:
        None for a model that must be staged to be known: a GGUF file, or one of many files on the
        Hub. Nothing was copied then.

    Raises:
        As `stage_model`, but for want of room.
    """
    retry = retry or RetryPolicy()
    listing = _list(source, config, retry)
    num_weight_files = sum(is_weights(file.name) for file in listing.files)
    is_hub = isinstance(listing.source, HubSource)
    if listing.is_gguf or (is_hub and num_weight_files > MAX_HUB_FILES):
        return None
    _copy(listing, [file for file in listing.files if not is_weights(file.name)], folder, retry)
    needed = check_small_files(
        folder,
        [file.name for file in listing.files],
        source=listing.source.uri,
        allowed_code=allowed_code,
    )
    weights = sorted((f for f in listing.files if f.name in needed), key=lambda file: file.name)
    return Peeked(listing.source.uri, _peek(listing.source, weights, retry, spans))


def copy_config(source: str, folder: Path, *, config: StorageConfig) -> None:
    """Copy a model's config.json, verified, into `folder`; nothing else of it is read.

    Raises:
        BadInput: it is a GGUF file, which has none before it is staged.
        As `peek_model` otherwise.
    """
    retry = RetryPolicy()
    listing = _list(source, config, retry)
    if listing.is_gguf:
        raise BadInput(
            f"{source}: a GGUF file has no config.json before it is converted; stage it first, by "
            f"`nightjar stage {source}`"
        )
    wanted = [file for file in listing.files if file.name == "config.json"]
    _copy(listing, wanted, folder, retry)


def _list(source: str, config: StorageConfig, retry: RetryPolicy) -> Listing:
    return list_model(open_source(source, config, open_places("auto"), retry))


def _copy(listing: Listing, files: list[SourceFile], folder: Path, retry: RetryPolicy) -> None:
    source = listing.source
    if isinstance(source, HubSource):
        source.download(files, folder, on_bytes=lambda count: None, on_file=lambda path: None)
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
        return
    copy = RangedCopy(source, folder, direct=False, retry=retry)
    try:
        copy.resume(with_promises(listing._replace(files=files)))
        copy.allocate()
        copy.run()
    finally:
        copy.close()
    for journal in folder.rglob("*.journal"):
        journal.unlink()


def _peek(
    source: Source, files: list[SourceFile], retry: RetryPolicy, spans: Spans
) -> Iterator[PeekedFile]:
    with ThreadPoolExecutor(_THREADS) as pool:
        peek = _Peek(source, retry, pool, spans)
        for file in files:
            yield peek.file(file)


class _Peek:
    """Reads spans of a source's files in threads."""

    def __init__(
        self, source: Source, retry: RetryPolicy, pool: ThreadPoolExecutor, spans: Spans
    ) -> None:
        self._source = source
        self._retry = retry
        self._pool = pool
        self._spans = spans

    def file(self, file: SourceFile) -> PeekedFile:
        """Read one weight file's header and its spans. Raises CorruptObject."""
        first = self._read(file, 0, min(file.size, _FIRST_BYTES))
        if len(first) < 8:
            check_header(b"{}", file.size, name=file.name)
        end = 8 + header_length(first[:8], file.size, name=file.name)
        header = first[8:end]
        if end > len(first):
            header += self._read(file, len(first), end)
        check_header(header, file.size, name=file.name)
        wanted = self._spans(file.size, len(header))
        blocks = list(self._pool.map(lambda span: self._read(file, *span), wanted))
        return PeekedFile(file.name, file.size, header, blocks)

    def _read(self, file: SourceFile, start: int, end: int) -> bytes:
        for attempt in range(self._retry.max_attempts):
            try:
                return self._read_once(file, start, end)
            except StoreUnavailable:
                if attempt + 1 == self._retry.max_attempts:
                    raise
                time.sleep(self._retry.delay_s(attempt))
        raise AssertionError("a retry policy allows at least one attempt")

    def _read_once(self, file: SourceFile, start: int, end: int) -> bytes:
        if isinstance(self._source, HubSource):
            return self._source.read_range(file, start, end)
        data = bytearray(end - start)
        body = self._source.open_range(file, start, end)
        try:
            fill(body, memoryview(data), file.name)
        finally:
            body.close()
        return bytes(data)
