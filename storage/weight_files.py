"""Which files of a model are staged, and what must be true of them before they are used.

Only data is staged: safetensors, JSON, tokenizer files, templates, text. Pickles, Python and archives
are never copied; a model that would need one is refused with the file named.
"""

import hashlib
import json
import struct
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from storage import keys
from storage.errors import BadInput, CorruptObject

INDEX = "model.safetensors.index.json"
MANIFEST = "MANIFEST.json"
SHA256_SUMS = "SHA256SUMS"
RECORDS = (MANIFEST, SHA256_SUMS)
"""Digests recorded beside a model: read to check the others, never staged themselves."""

MAX_HEADER_BYTES = 100_000_000

_ALLOWED = {".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken"}
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack"}


class Selection(NamedTuple):
    """A model's files, sorted into what is staged and what is left where it is."""

    files: list[str]
    """Small files first, so that a bad model is refused before its weights are moved."""

    skipped: list[str]


def select(names: Iterable[str], *, source: str) -> Selection:
    """Sort a model's file names by the allow-list.

    Raises:
        BadInput: a name would leave the model folder, or the model has only weights of a refused kind.
    """
    present = sorted(_checked(name, source) for name in names)
    files = [name for name in present if _is_wanted(name)]
    weights = [name for name in files if is_weights(name)]
    skipped = [name for name in present if name not in files and name not in RECORDS]
    if not weights:
        refused = [name for name in skipped if PurePosixPath(name).suffix in _PICKLES]
        if refused:
            raise BadInput(
                f"{source}: weights only as {', '.join(refused[:3])}, which can run code when read; "
                "convert them to safetensors first"
            )
        raise BadInput(f"{source}: no .safetensors file among {len(present)} files")
    if "config.json" not in files:
        raise BadInput(f"{source}: no config.json among {len(present)} files")
    if INDEX not in files and "model.safetensors" not in files:
        raise BadInput(
            f"{source}: {len(weights)} .safetensors files but neither model.safetensors nor {INDEX}; "
            "upload the whole model"
        )
    if extra := _second_copies(files, weights):
        files, skipped = [name for name in files if name not in extra], sorted([*skipped, *extra])
    return Selection(sorted(files, key=is_weights), skipped)


def safe_path(folder: Path, name: str) -> Path:
    """Where a file of that name lies in the model folder.

    Raises:
        BadInput: it would lie outside, by its name or by a link on the way.
    """
    path = folder / _checked(name, str(folder))
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"{folder}: {name} leads outside the model folder; remove the link")
    return path


def is_weights(name: str) -> bool:
    """Whether the name is that of a weight file."""
    return name.endswith(".safetensors")


def is_read(name: str) -> bool:
    """Whether a file of that name is looked into at all."""
    return name in RECORDS or _is_wanted(name)


def _second_copies(files: list[str], weights: list[str]) -> set[str]:
    """Weight files that hold the same weights once more, in another layout."""
    if INDEX in files:
        return {name for name in weights if name.startswith("consolidated")}
    if "model.safetensors" in files:
        return set(weights) - {"model.safetensors"}
    return set()


def _checked(name: str, source: str) -> str:
    try:
        return keys.check(name)
    except ValueError as error:
        raise BadInput(f"{source}: {error}") from error


def _is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    if name in RECORDS or path.suffix not in _ALLOWED or any(p.startswith(".") for p in path.parts):
        return False
    # Folders below a model hold other forms of it (original/, onnx/); templates are the exception.
    return len(path.parts) == 1 or path.suffix == ".jinja"


def check_small_files(
    folder: Path, names: Collection[str], *, source: str, allowed_code: Collection[str] = ()
) -> set[str]:
    """Check what can be checked before any weights are moved; return the weight files that are needed.

    `allowed_code`: SHA-256 (hex) of config files that may name Python classes, which are never staged.

    Raises:
        BadInput: a config asks for Python code, or the index names a file that is not there.
        CorruptObject: a JSON file cannot be parsed.
    """
    for name in names:
        if PurePosixPath(name).name.endswith("config.json"):
            _refuse_code(folder / name, name, source, allowed_code)
    weights = {name for name in names if is_weights(name)}
    if INDEX not in names:
        return weights
    index = _read_json(folder / INDEX, INDEX, source)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptObject(f"{source}: {INDEX} has no weight_map")
    wanted = {_checked(str(name), source) for name in weight_map.values()}
    if missing := sorted(wanted - weights):
        raise BadInput(
            f"{source}: {INDEX} names {missing[0]}, which is not there "
            f"({len(missing)} of {len(wanted)} weight files missing); upload the model again"
        )
    return wanted


def _refuse_code(path: Path, name: str, source: str, allowed_code: Collection[str]) -> None:
    if "auto_map" not in _read_json(path, name, source):
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest not in allowed_code:
        raise BadInput(
            f"{source}: {name} has auto_map, code of the model's own, which is never run; use a model whose "
            f"class transformers ships, or, to load the shipped class in its place, give "
            f"model.allowed_code: [{digest}] in the job, or --allow-code {digest}"
        )


def _read_json(path: Path, name: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptObject(f"{source}: {name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptObject(f"{source}: {name} is not a JSON object")
    return value


def check_safetensors(path: Path, *, name: str) -> bytes:
    """Check a safetensors file's header against its size; return the header's bytes.

    Raises:
        CorruptObject: too short, a header above 100 MB, gaps, overlaps, or another size than promised.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CorruptObject(f"{name}: {size} bytes are too few for a safetensors file")
        header_bytes = header_length(prefix, size, name=name)
        header = file.read(header_bytes)
    check_header(header, size, name=name)
    return header


def header_length(prefix: bytes, size: int, *, name: str) -> int:
    """Return how long the header is, from the file's first 8 bytes. Raises CorruptObject."""
    (header_bytes,) = struct.unpack("<Q", prefix)
    if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
        raise CorruptObject(f"{name}: header of {header_bytes} bytes in a file of {size} bytes")
    return int(header_bytes)


def check_header(header: bytes, size: int, *, name: str) -> None:
    """Check a safetensors header against the size of its file. Raises CorruptObject."""
    end = _end_of_tensors(header, name)
    if 8 + len(header) + end != size:
        raise CorruptObject(
            f"{name}: header promises {8 + len(header) + end} bytes, the file has {size}"
        )


def _end_of_tensors(header: bytes, name: str) -> int:
    try:
        spans = sorted(
            (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]))
            for tensor, entry in json.loads(header).items()
            if tensor != "__metadata__"
        )
    except (
        ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {ascii(str(error))[1:-1][:200]}"
        raise CorruptObject(f"{name}: safetensors header cannot be read: {reason}") from error
    end = 0
    for start, stop in spans:
        if start != end or stop < start:
            raise CorruptObject(f"{name}: tensor data is not contiguous at byte {end}")
        end = stop
    return end


def read_sha256_sums(text: str, *, source: str) -> dict[str, str]:
    """Parse the output of `sha256sum`: file name -> hex digest.

    Raises:
        CorruptObject: a line has another form.
    """
    sums = {}
    for line in text.splitlines():
        digest, _, name = line.strip().partition(" ")
        name = name.strip().lstrip("*").removeprefix("./")
        if not line.strip():
            continue
        if len(digest) != 64 or not name or set(digest.lower()) - set("0123456789abcdef"):
            raise CorruptObject(f"{source}: a line of {SHA256_SUMS} is not 'digest  name'")
        sums[name] = digest.lower()
    return sums
