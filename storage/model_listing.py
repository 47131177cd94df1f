"""What a source's model consists of: files to stage, files left out, and every promise about bytes."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from storage.checksums import KNOWN_ALGORITHMS, SHA256, Checksum
from storage.errors import BadInput, CorruptObject, NoSpace
from storage.hub_source import HubSource, open_hub
from storage.local_source import LocalSource
from storage.model_caches import Place
from storage.model_manifest import ModelManifest, StagedFile, content_id, is_ours
from storage.object_store import StorageConfig
from storage.s3_client import RetryPolicy
from storage.stage_sources import S3Source, SourceFile, open_s3
from storage.weight_files import MANIFEST, RECORDS, SHA256_SUMS, read_sha256_sums, select

GGUF_SUFFIX = ".gguf"
_GGUF_EXPANSION = 4  # 4-bit blocks to bfloat16; fewer bits per weight are rare

Source = S3Source | LocalSource | HubSource


class Listing(NamedTuple):
    """One model at one moment."""

    source: Source
    files: list[SourceFile]
    """To be staged; small files first."""

    records: list[SourceFile]
    """Digest lists beside the model."""

    skipped: list[str]
    content_id: str

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def is_gguf(self) -> bool:
        """Whether it is one GGUF file, to be converted while it is staged."""
        return [file.name.endswith(GGUF_SUFFIX) for file in self.files] == [True]

    @property
    def staged_bytes(self) -> int:
        """What it will take on disk; for GGUF an estimate: the file beside its unpacked weights."""
        return self.num_bytes * (1 + _GGUF_EXPANSION) if self.is_gguf else self.num_bytes


def open_source(
    source: str, config: StorageConfig, places: list[Place], retry: RetryPolicy | None = None
) -> Source:
    """Open a model's source; the Hub's answers are kept in the first of the places.

    Raises:
        BadInput: the scheme is unknown.
        NotFound: there is no such folder.
        NoSpace: there is no place to keep the Hub's answers.
    """
    if source.startswith("s3://"):
        return open_s3(source, config, retry)
    if source.startswith("hf://"):
        if not places:
            raise NoSpace("no folder to stage to can be written; name one with stage_to")
        return open_hub(source, places[0].cache.sources)
    scheme, separator, rest = source.partition("://")
    if separator and scheme != "file":
        raise BadInput(f"{source}: unknown scheme {scheme}://; use s3://, hf:// or a folder")
    return LocalSource(Path(rest if separator else source).expanduser())


def list_model(source: Source, *, gguf_dtype: str = "") -> Listing:
    """List a model and sort its files; one request. `gguf_dtype` is part of a GGUF model's id.

    Raises:
        BadInput: it has no weights, no config, only refused formats, or a file name that leads outside.
        CorruptObject: a list of digests in a local folder cannot be read.
    """
    by_name = {file.name: file for file in source.list_files()}
    if source.uri.endswith(GGUF_SUFFIX):
        (file,) = by_name.values()
        name = content_id([file], identity=source.identity, dtype=gguf_dtype)
        return Listing(source=source, files=[file], records=[], skipped=[], content_id=name)
    names, skipped = select(by_name, source=source.uri)
    listing = Listing(
        source=source,
        files=[by_name[name] for name in names],
        records=[by_name[name] for name in RECORDS if name in by_name],
        skipped=skipped,
        content_id="",
    )
    if isinstance(source, LocalSource):
        listing = listing._replace(files=with_promises(listing))
    return listing._replace(content_id=content_id(listing.files, identity=source.identity))


def with_promises(listing: Listing) -> list[SourceFile]:
    """The model's files with what the store, or a list beside them, promises of their bytes.

    Raises:
        InputChanged: a file was replaced since the listing.
        CorruptObject: a list of digests cannot be read.
    """
    if isinstance(listing.source, HubSource):
        return listing.files
    files = listing.source.describe(listing.files)
    if all(file.checksum for file in files):
        return files
    recorded = recorded_checksums(listing)
    return [
        file
        if file.checksum or file.name not in recorded
        else replace(file, checksum=recorded[file.name][0], promised_by=recorded[file.name][1])
        for file in files
    ]


def recorded_checksums(listing: Listing) -> dict[str, tuple[Checksum, str]]:
    """Digests by file name from MANIFEST.json or SHA256SUMS beside the model; empty without them."""
    source = listing.source
    assert not isinstance(source, HubSource), "the Hub promises every digest itself"
    found: dict[str, tuple[Checksum, str]] = {}
    for record in reversed(listing.records):  # MANIFEST.json last: its CRCs cost nothing to compare
        data, where = source.read(record), f"{source.uri} {record.name}"
        if record.name == SHA256_SUMS:
            sums = read_sha256_sums(data.decode(errors="replace"), source=source.uri)
            found |= {name: (Checksum(SHA256, value), SHA256_SUMS) for name, value in sums.items()}
        elif record.name == MANIFEST and is_ours(data):
            manifest = ModelManifest.from_json(data, source=where)
            checksums = {file.name: _promise(file, where) for file in manifest.files}
            found |= {name: (value, MANIFEST) for name, value in checksums.items() if value}
    return found


def _promise(file: StagedFile, where: str) -> Checksum | None:
    try:
        checksum = Checksum.parse(file.checksum)
    except ValueError as error:
        raise CorruptObject(
            f"{where}: {file.name}: {error}; correct or remove the record"
        ) from error
    return checksum if checksum.algorithm in KNOWN_ALGORITHMS else None
