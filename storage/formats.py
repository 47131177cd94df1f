"""What kind of file an input is: by its name, and by its content where the name lies."""

import json
import zlib
from pathlib import Path

import zstandard

from storage.errors import BadInput
from storage.text_readers import GZIP_MAGIC, ZSTD_MAGIC, open_bytes

SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
_SNIFF_BYTES = 1 << 20


def by_name(name: str) -> str | None:
    """Return the format a file name promises, compression aside; None when it promises nothing."""
    stem = name.lower().removesuffix(".gz").removesuffix(".zst")
    return next((kind for suffix, kind in SUFFIXES.items() if stem.endswith(suffix)), None)


def detect(path: Path, *, name: str, asked: str = "auto") -> str:
    """Return parquet, jsonl, csv, arrow or openai-batch; `asked` other than auto decides.

    A decisive content (Parquet's or Arrow's magic, a JSON object under a Parquet name) beats the
    name. JSON Lines whose first object has `custom_id` and `body` is an OpenAI batch.

    Raises:
        BadInput: neither name nor content tells, or it is a JSON array.
    """
    if asked not in ("auto", "dataset"):
        return asked
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1"):
        return "arrow"
    promised = by_name(name)
    is_packed = head.startswith((GZIP_MAGIC, ZSTD_MAGIC))
    if promised == "arrow" or (promised == "parquet" and is_packed):
        return promised
    if promised == "csv":
        return promised
    start = _start(path, name)
    if promised == "parquet":
        return _json_kind(start, name) if start[:1] == b"{" else promised
    if promised == "jsonl" or start[:1] in (b"{", b"["):
        return _json_kind(start, name)
    raise BadInput(
        f"{name}: cannot tell what kind of file this is; set input.format, or name it "
        f"{', '.join(SUFFIXES)} (with .gz or .zst if packed)"
    )


def _json_kind(start: bytes, name: str) -> str:
    if start[:1] == b"[":
        raise BadInput(f"{name}: is a JSON array; write one object per line (JSON Lines)")
    try:
        first = json.loads(start.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return "jsonl"  # told properly, with its line, when it is read
    is_request = isinstance(first, dict) and "custom_id" in first and "body" in first
    return "openai-batch" if is_request else "jsonl"


def _start(path: Path, name: str) -> bytes:
    """Return the beginning of the text, without a byte-order mark and blank lines."""
    try:
        with open_bytes(path) as stream:
            return stream.read(_SNIFF_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise BadInput(f"{name}: damaged: {str(error) or type(error).__name__}") from None
