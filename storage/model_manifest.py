"""MANIFEST.json of a staged model: what it is, what every file's checksum is, and who vouched for it."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.checksums import GIT_BLOB, SHA256
from storage.errors import CorruptObject
from storage.manifest import to_json
from storage.stage_sources import SourceFile

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedFile:
    """One whole file of a staged model."""

    name: str
    size: int
    checksum: str
    """Of the bytes as they were written, such as `crc64nvme:...`."""

    verified_by: str
    """Whose promise the bytes were compared with; empty: nobody promised anything."""

    mtime_ns: int
    """When it was published; a file with another time was touched since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelManifest:
    """A staged model is whole exactly when this file is there and its files are untouched."""

    content_id: str
    source: str
    num_bytes: int
    files: list[StagedFile]
    skipped: list[str]
    """Files of the source that are not staged: other formats, Python, pickles."""

    staged_at: str

    @property
    def unverified(self) -> list[str]:
        """Files whose bytes nobody vouched for."""
        return [file.name for file in self.files if not file.verified_by]

    def is_untouched(self, folder: Path) -> bool:
        """Whether every file has the size and time it was published with."""
        for file in self.files:
            try:
                found = (folder / file.name).stat()
            except OSError:
                return False
            if (found.st_size, found.st_mtime_ns) != (file.size, file.mtime_ns):
                return False
        return True

    def to_json(self) -> bytes:
        return to_json({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, data: bytes, *, source: str) -> "ModelManifest":
        """Read it back. Raises CorruptObject."""
        try:
            value: dict[str, Any] = json.loads(data)
            if (found := value.pop("format")) != FORMAT:
                raise CorruptObject(f"{source}: format {found}, this Nightjar reads {FORMAT}")
            files = [StagedFile(**item) for item in value.pop("files")]
            return cls(files=files, **value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptObject(f"{source}: not a model manifest: {error}") from error


def is_ours(data: bytes) -> bool:
    """Whether a MANIFEST.json means to be one of these, whole or damaged; other tools use the name too."""
    return b'"content_id"' in data


def content_id(files: Iterable[SourceFile], *, identity: str, dtype: str = "") -> str:
    """Name a model by what it is.

    Two places that promise the same hashes share a name. Where no hash is known, the place
    (`identity`) and the ETags are the name: a replaced file gives another one. So it is with local
    files, whose promises are not compared before they are copied: size, time and samples count too.
    `dtype` is what the weights are converted to, where they are.
    """
    listed = sorted((file.name, file.size, _content_of(file) or file.etag) for file in files)
    by_content = all(_content_of(file) for file in files)
    converted = [dtype] if dtype else []
    text = json.dumps(["" if by_content else identity, listed, *converted])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _content_of(file: SourceFile) -> str:
    if file.fingerprint:
        return f"{file.etag} {file.fingerprint} {file.checksum or ''}"
    if file.checksum and file.checksum.algorithm in (SHA256, GIT_BLOB):
        return str(file.checksum)
    return ""
