"""JSON Lines and CSV, read row by row with bounded memory, plain or compressed.

A byte-order mark, CRLF, blank lines and a missing final newline are all fine. Every row knows the
line it starts on. Bytes that are not UTF-8 come out as lone surrogates, like half pairs escaped in
JSON, so that the caller can treat both alike.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from storage.errors import BadInput

MAX_LINE_BYTES = 64 * 1024 * 1024
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_ZSTD_CHUNK = 8 * 1024


class TextRow(NamedTuple):
    """One record of a text file."""

    line: int  # where it starts, from 1
    num_bytes: int  # about as much as it takes in the file
    values: dict[str, Any] | None  # None when the record is malformed
    error: str | None


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressing gzip and zstd by what it starts with."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic.startswith(GZIP_MAGIC):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if magic == ZSTD_MAGIC:
        return io.BufferedReader(_ZstdStream(path), 1 << 20)
    return path.open("rb")


def read_jsonl(path: Path, *, name: str) -> Iterator[TextRow]:
    """Yield every record of a JSON Lines file; a malformed line is a row with an error.

    Raises:
        BadInput: the compressed stream is damaged, a line is absurdly long, or it is not UTF-8 text.
    """
    line = 0
    try:
        with open_bytes(path) as stream:
            while data := stream.readline(MAX_LINE_BYTES + 1):
                line += 1
                if line == 1:
                    data = _without_bom(data, name)
                if len(data) > MAX_LINE_BYTES:
                    raise BadInput(f"{name}: line {line} is longer than {MAX_LINE_BYTES} bytes")
                if data := data.strip():
                    yield _json_row(line, data)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, MemoryError) as error:
        raise BadInput(f"{name}: damaged after line {line}: {_reason(error)}") from None


def _json_row(line: int, data: bytes) -> TextRow:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode("utf-8", "surrogateescape")
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        return TextRow(line, len(data), None, f"line {line}: nested too deeply")
    except json.JSONDecodeError as error:
        return TextRow(line, len(data), None, f"line {line}: not JSON at column {error.colno}")
    except ValueError as error:
        return TextRow(line, len(data), None, f"line {line}: {str(error)[:200]}")
    if not isinstance(values, dict):
        return TextRow(line, len(data), None, f"line {line}: not a JSON object")
    return TextRow(line, len(data), values, None)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def csv_header(path: Path, *, name: str) -> list[str]:
    """Return a CSV file's column names; none for an empty file.

    Raises:
        BadInput: a name appears twice, or the file cannot be read.
    """
    with _open_csv(path, name) as stream:
        header = _next_record(csv.reader(stream, strict=True, delimiter=_delimiter(name)), name)
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise BadInput(f"{name}: column {twice[0]!r} appears twice in the header; rename one")
    return header


def read_csv(path: Path, *, name: str) -> Iterator[TextRow]:
    """Yield every record of a CSV file with a header (RFC 4180); all values are text.

    Raises:
        BadInput: a quote is never closed, the compressed stream is damaged, or it is not UTF-8 text.
    """
    header = csv_header(path, name=name)
    with _open_csv(path, name) as stream:
        reader = csv.reader(stream, strict=True, delimiter=_delimiter(name))
        _next_record(reader, name)
        line = reader.line_num + 1
        while record := _next_record(reader, name, skip_blank=len(header) != 1):
            size = sum(map(len, record)) + len(record)
            if len(record) == len(header):
                yield TextRow(line, size, dict(zip(header, record, strict=True)), None)
            else:
                fault = f"line {line}: {len(record)} fields, the header has {len(header)}"
                yield TextRow(line, size, None, fault)
            line = reader.line_num + 1


def _next_record(reader: Any, name: str, *, skip_blank: bool = True) -> list[str]:
    """Return the next record, or an empty list at the end."""
    try:
        for record in reader:
            if record or not skip_blank:
                return record or [""]
    except csv.Error as error:
        raise BadInput(f"{name}: not CSV near line {reader.line_num}: {_reason(error)}") from None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, MemoryError) as error:
        raise BadInput(f"{name}: damaged after line {reader.line_num}: {_reason(error)}") from None
    return []


def _open_csv(path: Path, name: str) -> io.TextIOWrapper:
    csv.field_size_limit(MAX_LINE_BYTES)
    with open_bytes(path) as probe:
        try:
            _without_bom(probe.read(4), name)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise BadInput(f"{name}: damaged: {_reason(error)}") from None
    return io.TextIOWrapper(
        open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline=""
    )


def _delimiter(name: str) -> str:
    stem = name.lower().removesuffix(".gz").removesuffix(".zst")
    return "\t" if stem.endswith(".tsv") else ","


def _without_bom(data: bytes, name: str) -> bytes:
    if data.startswith(_UTF16):
        raise BadInput(f"{name}: is UTF-16; save it as UTF-8")
    return data.removeprefix(_BOM)


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class _ZstdStream(io.RawIOBase):
    """Decompresses zstd frames; unlike the library's stream, a cut frame is an error."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = _new_frame()
        self._is_between = True
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_between = _new_frame(), True
            data = data or self._file.read(_ZSTD_CHUNK)
            if not data:
                if self._is_between:
                    return 0
                raise EOFError("the zstd stream is cut short")
            self._is_between = False
            self._pending = self._frame.decompress(data)
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _new_frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
