import csv
import gzip
import io
import json

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import BadInput
from storage.text_readers import read_csv, read_jsonl

SAME_FOLDER = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(tmp_path, data, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(tmp_path, data):
    return list(read_jsonl(write(tmp_path, data), name="rows.jsonl"))


def csv_rows(tmp_path, data, name="rows.csv"):
    return list(read_csv(write(tmp_path, data, name), name=name))


def test_bom_crlf_blank_lines_and_a_missing_final_newline_are_fine(tmp_path):
    rows = jsonl(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert [(row.line, row.values) for row in rows] == [(1, {"a": 1}), (4, {"a": 2})]


def test_a_line_of_several_megabytes_is_one_row(tmp_path):
    (row,) = jsonl(tmp_path, json.dumps({"a": "n" * 3_200_000}))
    assert len(row.values["a"]) == 3_200_000


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON at column 2"),
        ("[1]", "not a JSON object"),
        ("5", "not a JSON object"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": {"b": 1, "b": 2}}', "twice"),
        ("[" * 200_000, "deeply"),
        ('{"a": ' + "9" * 5000 + "}", "line 2"),
    ],
)
def test_a_malformed_line_is_one_bad_row_that_names_its_line(tmp_path, line, said):
    rows = jsonl(tmp_path, '{"a": 0}\n' + line + '\n{"a": 2}\n')
    assert [row.values is None for row in rows] == [False, True, False]
    assert said in rows[1].error
    assert rows[1].error.startswith("line 2")


def test_bytes_that_are_not_utf8_become_lone_surrogates(tmp_path):
    (row,) = jsonl(tmp_path, b'{"a": "caf\xe9"}')
    assert row.values == {"a": "caf\udce9"}


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_packed_files_are_read_by_their_content(tmp_path, pack):
    data = b"".join(b'{"a": %d}\n' % n for n in range(50_000))
    assert [row.values["a"] for row in jsonl(tmp_path, pack(data))] == list(range(50_000))


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_several_packed_members_are_one_file(tmp_path, pack):
    data = pack(b'{"a": 1}\n') + pack(b'{"a": 2}\n')
    assert [row.values["a"] for row in jsonl(tmp_path, data)] == [1, 2]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_packed_file_that_is_cut_short_is_refused(tmp_path, pack):
    data = pack(b"".join(json.dumps({"a": str(n) * 9}).encode() + b"\n" for n in range(9000)))
    with pytest.raises(BadInput, match=r"rows\.jsonl: damaged after line"):
        jsonl(tmp_path, data[: len(data) * 2 // 3])


@pytest.mark.parametrize(
    "pack", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress]
)
def test_a_packed_file_with_a_flipped_byte_is_refused(tmp_path, pack):
    data = bytearray(pack(b'{"a": "some text that is packed"}\n' * 50))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BadInput, match=r"rows\.jsonl: damaged"):
        jsonl(tmp_path, bytes(data))


def test_utf16_is_refused_with_the_remedy(tmp_path):
    for data, read in (('{"a": 1}', jsonl), ("a\n1\n", csv_rows)):
        with pytest.raises(BadInput, match="UTF-16; save it as UTF-8"):
            read(tmp_path, data.encode("utf-16"))


def test_a_line_beyond_all_bounds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("storage.text_readers.MAX_LINE_BYTES", 100)
    with pytest.raises(BadInput, match="line 2 is longer than 100"):
        jsonl(tmp_path, '{"a": 1}\n{"a": "' + "x" * 200 + '"}\n')


def test_csv_keeps_line_breaks_quotes_and_delimiters_in_fields(tmp_path):
    rows = csv_rows(tmp_path, 'a,b\r\n"x\r\ny\n\nz","say ""hi"", now"\r\n,last')
    assert [row.values for row in rows] == [
        {"a": "x\r\ny\n\nz", "b": 'say "hi", now'},
        {"a": "", "b": "last"},
    ]
    assert [row.line for row in rows] == [2, 6]


def test_a_bom_does_not_hide_the_first_csv_column(tmp_path):
    (row,) = csv_rows(tmp_path, b"\xef\xbb\xbfprompt,id\r\nhi,1\r\n")
    assert row.values == {"prompt": "hi", "id": "1"}


def test_tsv_splits_at_tabs(tmp_path):
    (row,) = csv_rows(tmp_path, "a\tb\n1,5\t2\n", name="rows.tsv.gz")
    assert row.values == {"a": "1,5", "b": "2"}


def test_one_csv_column_may_hold_empty_fields(tmp_path):
    assert [row.values["a"] for row in csv_rows(tmp_path, "a\nx\n\ny\n")] == ["x", "", "y"]


def test_a_csv_record_with_other_fields_than_the_header_is_one_bad_row(tmp_path):
    rows = csv_rows(tmp_path, "a,b\n1,2\n1,2,3\n\n1\n4,5\n")
    assert [row.values is None for row in rows] == [False, True, True, False]
    assert rows[1].error == "line 3: 3 fields, the header has 2"


@pytest.mark.parametrize("data", ['a,b\n"never closed,1\n2,3\n', 'a,b\n"x"y,1\n'])
def test_broken_csv_quotes_are_refused(tmp_path, data):
    with pytest.raises(BadInput, match=r"rows\.csv: not CSV near line"):
        csv_rows(tmp_path, data)


def test_a_csv_column_named_twice_is_refused(tmp_path):
    with pytest.raises(BadInput, match="'a' appears twice"):
        csv_rows(tmp_path, "a,b,a\n1,2,3\n")


def test_empty_files_have_no_rows(tmp_path):
    assert jsonl(tmp_path, b"") == []
    assert csv_rows(tmp_path, b"") == []
    assert csv_rows(tmp_path, b"a,b\r\n") == []


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), max_size=6))
@SAME_FOLDER
def test_any_json_objects_come_back_equal(tmp_path, rows):
    data = "\n".join(json.dumps(row) for row in rows)
    assert [row.values for row in jsonl(tmp_path, data)] == rows


@given(data=st.binary(max_size=200))
@SAME_FOLDER
def test_any_bytes_are_rows_or_a_clear_refusal(tmp_path, data):
    for read in (jsonl, csv_rows):
        try:
            rows = read(tmp_path, data)
        except BadInput:
            continue
        assert all((row.values is None) != (row.error is None) for row in rows)


CSV_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(rows=st.lists(st.tuples(CSV_TEXT, CSV_TEXT), max_size=6))
@SAME_FOLDER
def test_any_csv_text_comes_back_equal(tmp_path, rows):
    sink = io.StringIO()
    writer = csv.writer(sink, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *rows])
    found = csv_rows(tmp_path, sink.getvalue().encode())
    assert [(row.values["a"], row.values["b"]) for row in found] == rows
