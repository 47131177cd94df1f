import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from storage.errors import BadInput
from storage.formats import by_name, detect


def detected(tmp_path, data, name, asked="auto"):
    path = tmp_path / "file"
    path.write_bytes(data)
    return detect(path, name=name, asked=asked)


ROW = b'{"prompt": "x"}\n'
REQUEST = b'{"custom_id": "1", "body": {}}\n'


@pytest.mark.parametrize(
    ("data", "name", "expected"),
    [
        (ROW, "a.jsonl", "jsonl"),
        (ROW, "a.ndjson", "jsonl"),
        (ROW, "a.json", "jsonl"),
        (gzip.compress(ROW, mtime=0), "a.jsonl.gz", "jsonl"),
        (zstandard.compress(ROW), "a.JSONL.ZST", "jsonl"),
        (gzip.compress(ROW, mtime=0), "a.jsonl", "jsonl"),
        (b"", "a.jsonl", "jsonl"),
        (b"\xef\xbb\xbf\n" + REQUEST, "a.jsonl", "openai-batch"),
        (gzip.compress(REQUEST, mtime=0), "a.jsonl.gz", "openai-batch"),
        (b"a,b\n", "a.csv", "csv"),
        (b"a\tb\n", "a.tsv.gz", "csv"),
        (ROW, "a.parquet", "jsonl"),
        (b"", "a.parquet", "parquet"),
        (b"junk", "a.parquet", "parquet"),
        (ROW, "no-ending", "jsonl"),
        (b"ARROW1\0\0", "a.bin", "arrow"),
        (b"stream", "a.arrow", "arrow"),
        (b'{"custom_id": ', "a.jsonl", "jsonl"),
    ],
)
def test_names_promise_and_decisive_content_wins(tmp_path, data, name, expected):
    assert detected(tmp_path, data, name) == expected


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv", "none"])
def test_parquet_is_known_by_its_magic_under_any_name(tmp_path, name):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "p")
    assert detected(tmp_path, (tmp_path / "p").read_bytes(), name) == "parquet"


def test_a_format_that_is_asked_for_decides(tmp_path):
    assert detected(tmp_path, REQUEST, "a.jsonl", asked="jsonl") == "jsonl"
    assert detected(tmp_path, REQUEST, "a.jsonl", asked="dataset") == "openai-batch"


@pytest.mark.parametrize(
    ("data", "name", "said"),
    [
        (b"[1, 2]", "a.json", "JSON array"),
        (b"hello", "notes", "cannot tell"),
        (gzip.compress(ROW, mtime=0)[:15], "a.jsonl.gz", "damaged"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, data, name, said):
    with pytest.raises(BadInput, match=rf"{name}: .*{said}"):
        detected(tmp_path, data, name)


def test_packing_does_not_change_what_a_name_promises():
    assert [by_name(n) for n in ("x.csv.zst", "x.gz", "x")] == ["csv", None, None]
