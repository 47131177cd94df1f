"""Parquet files that other readers misread, choke on or run code from: each made in an instant.

`MAKERS` has one function per kind, which writes the kind's file or files into a folder. What becomes
of each is stated in `tests/faults/test_hostile_files.py`.
"""

import datetime
import decimal
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MiB = 1 << 20
MESSAGE = {"role": "user", "content": "hi"}
TWO = pa.table({"id": pa.array([1, 2], pa.int64()), "prompt": ["hi", "there"]})


def _write(folder: Path, table: pa.Table, name: str = "in.parquet", **options: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def _column(name: str, values: Any, kind: pa.DataType | None = None) -> Callable[[Path], None]:
    """A table of an id and this column."""

    def make(folder: Path) -> None:
        array = values if isinstance(values, pa.Array) else pa.array(values, kind)
        _write(folder, pa.table({"id": [3 + row for row in range(len(array))], name: array}))

    return make


def _beside(**columns: Any) -> Callable[[Path], None]:
    """A prompt `x` with further columns."""

    def make(folder: Path) -> None:
        _write(folder, pa.table({"prompt": ["x"], **columns}))

    return make


def _names(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        arrays = [pa.array([f"value {index}"]) for index in range(len(names))]
        _write(folder, pa.Table.from_arrays(arrays, names=list(names)))

    return make


def _lying_text(data: bytes) -> pa.Array:
    """A string array of bytes that are none."""
    offsets = struct.pack("<ii", 0, len(data))
    return pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _extension(name: str, metadata: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        kind = {"ARROW:extension:name": name, "ARROW:extension:metadata": metadata}
        schema = pa.schema([pa.field("prompt", pa.string(), metadata=kind)])
        _write(folder, pa.table([pa.array(["x"])], schema=schema))

    return make


def _damaged(change: Callable[[bytes], bytes], **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = _write(folder, TWO, **options)
        path.write_bytes(change(path.read_bytes()))

    return make


def _flipped(*places: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        found = bytearray(data)
        for place in places:
            found[place] ^= 0xFF
        return bytes(found)

    return change


def _hive(*folders: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in folders:
            _write(folder, TWO, f"{name}/a.parquet")
        (folder / "_SUCCESS").touch()
        (folder / ".crc").touch()

    return make


def _int96(folder: Path) -> None:
    when = pa.array([datetime.datetime(2600, 1, 1)], pa.timestamp("us"))
    table = pa.table({"prompt": ["x"], "ts": when})
    _write(folder, table, use_deprecated_int96_timestamps=True)


def _bit_flip_with_checksum(folder: Path) -> None:
    path = _write(folder, TWO, write_page_checksum=True)
    first, second = (pq.ParquetFile(path).metadata.row_group(0).column(i) for i in range(2))
    assert first.dictionary_page_offset < second.dictionary_page_offset
    path.write_bytes(_flipped(second.dictionary_page_offset - 1)(path.read_bytes()))


def _messages_beside_prompts(folder: Path) -> None:
    _write(folder, TWO, "0.parquet")
    _write(folder, pa.table({"id": [3], "messages": [[MESSAGE]]}), "1.parquet")


def _prompts_of_other_kinds(folder: Path) -> None:
    _write(folder, TWO, "0.parquet")
    for index, kind in enumerate((pa.large_string(), pa.string_view()), start=1):
        array = pa.array([f"kind {index}"], kind)
        _write(folder, pa.table({"id": [index + 2], "prompt": array}), f"{index}.parquet")
    words = pa.array(["kind 3"]).dictionary_encode()
    _write(folder, pa.table({"id": [5], "prompt": words}), "3.parquet")


def _ids_of_other_kinds(folder: Path) -> None:
    _write(folder, TWO, "0.parquet")
    _write(folder, pa.table({"id": ["a"], "prompt": ["x"]}), "1.parquet")


def _dictionary_bomb(folder: Path) -> None:
    """Two hundred times the text that the footer tells: the writer keeps it once per row group."""
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 100), pa.array(["x" * MiB]))
    schema = pa.schema([("prompt", pa.string()), ("note", pa.string())])
    with pq.ParquetWriter(folder / "in.parquet", schema, use_dictionary=True) as writer:
        for _ in range(2):
            note = words.cast(pa.string())
            writer.write_table(pa.table({"prompt": ["p"] * 100, "note": note}))


def _page_bomb(folder: Path) -> None:
    table = pa.table({"prompt": ["x" * MiB] * 320})
    _write(
        folder,
        table,
        compression="zstd",
        use_dictionary=False,
        data_page_size=1 << 30,
        write_statistics=False,
    )


def _cell_bomb(folder: Path) -> None:
    table = pa.table({"prompt": ["x" * (320 * MiB)]})
    _write(folder, table, compression="zstd", use_dictionary=False, write_statistics=False)


def _many_nulls(folder: Path) -> None:
    _write(folder, pa.table({"prompt": pa.nulls(5_000, pa.string())}), row_group_size=5_000)


def _nested_beyond_two_gigabytes(folder: Path) -> None:
    """More nested text in one row group than Arrow can build as one array; small on disk.

    Nobody has said all that text, so that no time is spent on tokens.
    """
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    first = pa.record_batch([pa.array([[MESSAGE]], kind)], names=["messages"])
    text = {"role": None, "content": "abcd" * (MiB // 4)}
    piece = pa.record_batch([pa.array([[text]] * 4, kind)], names=["messages"])
    table = pa.Table.from_batches([first, *[piece] * 528])
    _write(folder, table, compression="zstd", use_dictionary=False, row_group_size=10_000)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "normal": lambda folder: _write(folder, TWO),
    "large_string": _column("prompt", ["hi"], pa.large_string()),
    "string_view": _column("prompt", ["hi"], pa.string_view()),
    "dictionary": _column("prompt", pa.array(["hi", "hi"]).dictionary_encode()),
    "binary_utf8": _column("prompt", [b"hi"], pa.binary()),
    "strings_of_four_kinds": _prompts_of_other_kinds,
    "messages_struct": _column("messages", [[MESSAGE]]),
    "messages_extra_fields": _column(
        "messages", [[{**MESSAGE, "name": None, "tool_calls": [{"id": "1"}]}]]
    ),
    "messages_swapped_fields": _column("messages", [[{"content": "hi", "role": "user"}]]),
    "messages_multimodal_text": _column(
        "messages", [[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]]
    ),
    "messages_multimodal_image": _column(
        "messages", [[{"role": "user", "content": [{"type": "image_url", "url": "http://h/x"}]}]]
    ),
    "messages_map": _column(
        "messages",
        [[[("role", "user"), ("content", "hi")]]],
        pa.list_(pa.map_(pa.string(), pa.string())),
    ),
    "messages_json_string": _column("messages", [json.dumps([MESSAGE])]),
    "messages_beside_prompts": _messages_beside_prompts,
    "all_null_prompt": _column("prompt", pa.nulls(1)),
    "nulls": _column("prompt", ["a", None, ""]),
    "int_prompt": _column("prompt", [42]),
    "zero_rows": _column("prompt", [], pa.string()),
    "zero_columns": lambda folder: _write(folder, pa.table({})),
    "duplicate_columns": _names("id", "prompt", "prompt"),
    "names_that_differ_in_case": _names("id", "prompt", "Prompt"),
    "dotted_name": _names("id", "a.prompt", "prompt"),
    "not_utf8": _column("prompt", _lying_text(b"\xff\xfeA")),
    "lone_surrogate": _column("prompt", _lying_text(b"\xed\xa0\x80")),
    "nul_bytes": _column("prompt", ["a\x00b"]),
    "nanoseconds": _beside(ts=pa.array([10**18 + 1], pa.timestamp("ns"))),
    "time_out_of_range": _beside(ts=pa.array([10**17], pa.timestamp("us", "UTC"))),
    "int96": _int96,
    "decimal_and_uint64": _beside(
        big=pa.array([2**64 - 1], pa.uint64()), d=pa.array([decimal.Decimal("1.10")])
    ),
    "string_id": _beside(id=pa.array(["a"])),
    "ids_of_two_kinds": _ids_of_other_kinds,
    "extension_json": _column(
        "messages", pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps([MESSAGE])]))
    ),
    "extension_uuid": _beside(
        id=pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16)))
    ),
    "extension_pickle": _extension("arrow.py_extension_type", b"\x80\x04\x95boom"),
    "extension_unknown": _extension("ray.data.unknown", b"{}"),
    "cut_at_the_end": _damaged(lambda data: data[:-20]),
    "cut_at_the_start": _damaged(lambda data: data[20:]),
    "empty": _damaged(lambda data: b""),
    "magic_only": _damaged(lambda data: b"PAR1PAR1"),
    "huge_footer": _damaged(lambda data: data[:-8] + struct.pack("<I", 0x7FFFFFFF) + b"PAR1"),
    "encrypted": _damaged(lambda data: data[:-4] + b"PARE"),
    "jsonl_by_another_name": _damaged(lambda data: b'{"prompt": "hi"}\n'),
    "bit_flip": _damaged(_flipped(30, 34)),
    "bit_flip_with_checksum": _bit_flip_with_checksum,
    "hive_folder": _hive("lang=en"),
    "hive_folder_like_a_column": _hive("id=7"),
    "hive_null_folder": _hive("day=01", "day=__HIVE_DEFAULT_PARTITION__"),
    "dictionary_bomb": _dictionary_bomb,
    "page_bomb": _page_bomb,
    "cell_bomb": _cell_bomb,
    "many_nulls": _many_nulls,
    "nested_beyond_two_gigabytes": _nested_beyond_two_gigabytes,
}
