import datetime
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import parquet_reader
from storage.errors import BadInput
from storage.parquet_reader import ParquetInput


def write(tmp_path, table, **options):
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path, **options)
    return path


def read(path, start=0, end=None, columns=None):
    file = ParquetInput(path, name="rows.parquet")
    batches = list(file.batches(start, file.num_rows if end is None else end, columns))
    position = start
    for batch in batches:
        assert batch.row_start == position
        position += batch.records.num_rows
    file.close()
    return pa.Table.from_batches([batch.records for batch in batches], batches[0].records.schema)


NUMBERS = pa.table({"id": range(5000), "text": [str(n) * 3 for n in range(5000)]})


@pytest.mark.parametrize("row_group_size", [1, 7, 1000, 5000])
@pytest.mark.parametrize(("start", "end"), [(0, 300), (299, 300), (123, 261), (2, 299)])
def test_any_range_is_read_whatever_the_row_groups(tmp_path, row_group_size, start, end):
    path = write(tmp_path, NUMBERS.slice(0, 300), row_group_size=row_group_size)
    assert read(path, start, end).equals(NUMBERS.slice(start, end - start))


def test_an_empty_range_reads_nothing(tmp_path):
    file = ParquetInput(write(tmp_path, NUMBERS), name="rows")
    assert list(file.batches(17, 17)) == []


def test_rows_beyond_the_file_are_refused(tmp_path):
    file = ParquetInput(write(tmp_path, NUMBERS), name="rows")
    with pytest.raises(BadInput, match="has 5000 rows, 5001 were planned"):
        list(file.batches(0, 5001))


def test_batches_are_small_however_large_the_row_group(tmp_path):
    table = pa.table({"text": [chr(97 + n % 26) * 50_000 for n in range(2000)]})
    file = ParquetInput(write(tmp_path, table, row_group_size=2000), name="rows")
    sizes = [batch.records.nbytes for batch in file.batches(0, 2000)]
    assert max(sizes) <= 2 * parquet_reader.BATCH_BYTES
    assert sum(sizes) >= 2000 * 50_000


def test_a_footer_that_hides_the_decoded_size_does_not_make_large_batches(tmp_path):
    table = pa.table({"text": ["x" * 1_000_000] * 300})
    path = write(tmp_path, table, use_dictionary=True)
    assert path.stat().st_size < 2_000_000
    file = ParquetInput(path, name="rows")
    assert max(batch.records.nbytes for batch in file.batches(0, 300)) <= 16_000_000


def test_rows_that_grow_within_a_row_group_make_the_batches_shrink(tmp_path):
    table = pa.table({"text": ["x"] * 1000 + ["y" * 1_000_000] * 200})
    path = write(tmp_path, table, use_dictionary=True)
    file = ParquetInput(path, name="rows")
    batches = list(file.batches(0, 1200))
    assert sum(batch.records.num_rows for batch in batches) == 1200
    # One batch may be too large before it is noticed; those after it are not.
    large = [batch for batch in batches if batch.records.nbytes > 8 * parquet_reader.BATCH_BYTES]
    assert len(large) <= 1


def test_only_the_columns_asked_for_are_read(tmp_path):
    assert read(write(tmp_path, NUMBERS), columns=["id"]).column_names == ["id"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.timestamp("ns", "Europe/Berlin"),
        pa.decimal128(20, 2),
        pa.uint64(),
        pa.list_(pa.struct([("role", pa.string())])),
        pa.map_(pa.string(), pa.string()),
    ],
    ids=str,
)
def test_types_come_back_as_they_were_written(tmp_path, kind):
    values = {
        "timestamp": [10**18 + 1, None],
        "decimal": [None, None],
        "uint64": [2**64 - 1, None],
        "list": [[{"role": "user"}], None],
        "map": [[("a", "b")], None],
        "binary": [b"\xff", None],
    }
    found = next((value for name, value in values.items() if str(kind).startswith(name)), None)
    array = pa.array(found or ["x", None], pa.string() if found is None else kind)
    table = pa.table({"v": array.cast(kind)})
    assert read(write(tmp_path, table)).equals(table)


def test_old_timestamps_do_not_wrap(tmp_path):
    when = datetime.datetime(2600, 1, 1)
    table = pa.table({"ts": pa.array([when], pa.timestamp("us"))})
    path = write(tmp_path, table, use_deprecated_int96_timestamps=True)
    assert read(path).column("ts").to_pylist() == [when]


def test_a_column_named_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    with pytest.raises(BadInput, match="'prompt' appears twice"):
        ParquetInput(write(tmp_path, table), name="rows")


def test_names_that_differ_in_case_are_two_columns(tmp_path):
    table = pa.table({"prompt": ["a"], "Prompt": ["b"]})
    assert read(write(tmp_path, table)).equals(table)


def test_a_python_extension_type_is_data_and_runs_nothing(tmp_path):
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": b"\x80\x04\x95boom",
    }
    field = pa.field("prompt", pa.string(), metadata=metadata)
    table = pa.table([pa.array(["x"])], schema=pa.schema([field]))
    assert read(write(tmp_path, table)).column("prompt").to_pylist() == ["x"]


def damage(data, how):
    cut = {
        "cut at the end": data[:-20],
        "cut at the start": data[20:],
        "empty": b"",
        "magic only": b"PAR1PAR1",
        "huge footer": data[:-8] + struct.pack("<I", 0x7FFFFFFF) + b"PAR1",
        "encrypted": data[:-4] + b"PARE",
        "text": b'{"prompt":"x"}\n',
    }
    return cut[how]


@pytest.mark.parametrize(
    "how",
    [
        "cut at the end",
        "cut at the start",
        "empty",
        "magic only",
        "huge footer",
        "encrypted",
        "text",
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, how):
    path = write(tmp_path, NUMBERS)
    path.write_bytes(damage(path.read_bytes(), how))
    with pytest.raises(BadInput, match=r"rows\.parquet: "):
        read(path)


def test_a_flipped_bit_is_found_by_the_page_checksum(tmp_path):
    path = write(tmp_path, NUMBERS, write_page_checksum=True, row_group_size=1000)
    data = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(3).column(1).data_page_offset + 200
    data[offset] ^= 0x40
    path.write_bytes(bytes(data))
    with pytest.raises(BadInput, match=r"rows\.parquet: damaged near row 3000 \(row group 3\)"):
        read(path)


def test_rows_before_the_damage_can_be_read(tmp_path):
    path = write(tmp_path, NUMBERS, write_page_checksum=True, row_group_size=1000)
    data = bytearray(path.read_bytes())
    data[pq.ParquetFile(path).metadata.row_group(3).column(1).data_page_offset + 200] ^= 0x40
    path.write_bytes(bytes(data))
    assert read(path, 0, 3000).equals(NUMBERS.slice(0, 3000))


def test_nested_columns_that_arrow_cannot_build_at_once_are_read_in_smaller_pieces(
    tmp_path, monkeypatch
):
    path = write(tmp_path, NUMBERS)
    asked = []
    real = ParquetInput._decode

    def limited(self, group, first, batch_rows, columns):
        asked.append(batch_rows)
        if batch_rows > 64:
            raise pa.ArrowNotImplementedError("Nested data conversions not implemented")
        return real(self, group, first, batch_rows, columns)

    monkeypatch.setattr(ParquetInput, "_decode", limited)
    assert read(path).equals(NUMBERS)
    assert min(asked) < 64 < max(asked)


def test_a_row_that_is_too_large_alone_is_refused_by_number(tmp_path, monkeypatch):
    path = write(tmp_path, NUMBERS)

    def never(*_):
        raise MemoryError("malloc of size 999 failed")

    monkeypatch.setattr(ParquetInput, "_decode", never)
    with pytest.raises(BadInput, match=r"row 0 \(row group 0\) needs more memory"):
        read(path)


def test_a_column_name_that_is_not_utf8_is_refused(tmp_path):
    path = write(tmp_path, pa.table({"prompt": ["x"]}), store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"prompt", b"pr\xeempt"))
    with pytest.raises(BadInput, match=r"rows\.parquet: not a readable Parquet file"):
        read(path)


@pytest.mark.parametrize("num_rows", [4, 6, -5])
def test_a_footer_that_miscounts_its_rows_is_refused(tmp_path, num_rows):
    table = pa.table({"v": pa.array([1, 2, 3, 4, 5], pa.int8())})
    path = write(tmp_path, table, store_schema=False, compression="none", use_dictionary=False)
    data = path.read_bytes()
    # In the footer, after the schema: field 3, a zigzag varint.
    at = data.rindex(b"\x16\x0a\x19\x1c")
    zigzag = num_rows * 2 if num_rows >= 0 else -num_rows * 2 - 1
    path.write_bytes(data[: at + 1] + bytes([zigzag]) + data[at + 2 :])
    with pytest.raises(BadInput, match=f"the footer tells {num_rows} rows, its row groups 5"):
        read(path)
