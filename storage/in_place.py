"""Use a model where it lies: nothing is copied, but what can be checked is checked."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from storage.checksums import file_checksum
from storage.destinations import disk_kind
from storage.errors import CorruptObject
from storage.local_source import LocalSource
from storage.model_listing import Listing, recorded_checksums
from storage.model_manifest import ModelManifest, StagedFile, is_ours
from storage.stage_sources import SourceFile
from storage.weight_files import MANIFEST, check_safetensors, check_small_files, is_weights

_THREADS = 4


def good_disk(source: LocalSource) -> str:
    """Why a folder is best read where it is; empty when its disk is not local."""
    kind = disk_kind(source.path)
    return "" if kind == "network" else f"read in place: {source.path} is on a local disk ({kind})"


def with_own_id(listing: Listing) -> Listing:
    """A staged folder that nobody touched keeps the id it was staged under."""
    assert isinstance(listing.source, LocalSource), "only folders are read in place"
    manifest, folder = _manifest_beside(listing), listing.source.path
    if manifest is None or manifest.content_id != folder.resolve().name:
        return listing
    names = {file.name for file in listing.files}
    if names != {file.name for file in manifest.files} or not manifest.is_untouched(folder):
        return listing
    return listing._replace(content_id=manifest.content_id)


def read_in_place(listing: Listing, *, allowed_code: frozenset[str]) -> ModelManifest:
    """Check a local model and describe it as if it had been staged.

    Every weight file's header is compared with its size; where digests are recorded beside the model
    (MANIFEST.json, SHA256SUMS), every file is read and compared.

    Raises:
        BadInput, CorruptObject: as when staging.
    """
    source = listing.source
    assert isinstance(source, LocalSource), "only folders are read in place"
    names = [file.name for file in listing.files]
    needed = check_small_files(source.path, names, source=source.uri, allowed_code=allowed_code)
    files = [file for file in listing.files if not is_weights(file.name) or file.name in needed]
    for file in files:
        if is_weights(file.name):
            check_safetensors(source.path / file.name, name=file.name)
    with ThreadPoolExecutor(_THREADS) as pool:
        checked = list(pool.map(_Checker(listing).check, files))
    kept = {file.name for file in files}
    return ModelManifest(
        content_id=listing.content_id,
        source=source.uri,
        num_bytes=sum(file.size for file in files),
        files=checked,
        skipped=sorted([*listing.skipped, *(name for name in names if name not in kept)]),
        staged_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


class _Checker:
    """Compares files with what is recorded beside them."""

    def __init__(self, listing: Listing) -> None:
        assert isinstance(listing.source, LocalSource), "only folders are read in place"
        self._folder = listing.source.path
        self._recorded = recorded_checksums(listing)
        self._published = _published_times(listing)

    def check(self, file: SourceFile) -> StagedFile:
        path = self._folder / file.name
        want, promised_by = self._recorded.get(file.name, (None, ""))
        mtime_ns = path.stat().st_mtime_ns
        if want and self._published.get(file.name) != (file.size, mtime_ns):
            found = file_checksum(path, want.algorithm)
            if found != want:
                raise CorruptObject(
                    f"{path}: {promised_by} promises {want}, the file has {found}; "
                    "fetch it again, or remove the record if the file was changed on purpose"
                )
        return StagedFile(
            name=file.name,
            size=file.size,
            checksum=str(want) if want else f"sampled:{file.fingerprint}",
            verified_by=promised_by,
            mtime_ns=mtime_ns,
        )


def _published_times(listing: Listing) -> dict[str, tuple[int, int]]:
    """Size and time of files that Nightjar itself verified when it staged them to this very folder."""
    manifest = _manifest_beside(listing)
    return {file.name: (file.size, file.mtime_ns) for file in manifest.files} if manifest else {}


def _manifest_beside(listing: Listing) -> ModelManifest | None:
    assert isinstance(listing.source, LocalSource), "only folders are read in place"
    for record in listing.records:
        if record.name == MANIFEST:
            data = listing.source.read(record)
            if is_ours(data):
                return ModelManifest.from_json(data, source=listing.source.uri)
    return None
