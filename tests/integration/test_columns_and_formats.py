"""What goes in comes out: column types, samples, per-row sampling and every input format, all the way through."""

import csv
import gzip
import io
import json
import os
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from storage import records
from tests.pipeline import Finished, Nightjar
from tests.processes import children, cli_in

MiB = 1 << 20


@pytest.fixture
def nightjar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Nightjar:
    return Nightjar(tmp_path, capsys)


def dummy(nightjar: Nightjar, uri: Any, **settings: Any) -> Finished:
    done = nightjar.run("none", uri, **{"engine__backend": "dummy", **settings})
    if done.code == 0:
        assert nightjar.call("verify", str(done.run)).code == 0
    return done


def every_type(num_rows: int = 12) -> pa.Table:
    """A column of every type that Parquet and Arrow keep, with nulls, extremes and odd values."""
    start = datetime(2026, 3, 29, 0, 59, 59, 123456, tzinfo=UTC)
    moments = [start + timedelta(hours=row) for row in range(num_rows)]
    nested = pa.struct(
        [
            pa.field("a", pa.int64()),
            pa.field("b", pa.list_(pa.struct([pa.field("c", pa.string())]))),
        ]
    )

    def some(make: Callable[[int], Any], kind: pa.DataType) -> pa.Array:
        return pa.array([None if row % 5 == 4 else make(row) for row in range(num_rows)], kind)

    columns = {
        "prompt": pa.array([f"say {row}" for row in range(num_rows)]),
        "int64": some(lambda row: 9007199254740993 + row, pa.int64()),
        "uint64": some(lambda row: 2**64 - 1 - row, pa.uint64()),
        "int8": some(lambda row: -128 + row, pa.int8()),
        "float32": some(lambda row: [float("nan"), -0.0, 1e-45][row % 3], pa.float32()),
        "double": some(lambda row: 0.1 * row, pa.float64()),
        "bool": some(lambda row: row % 2 == 0, pa.bool_()),
        "moment_tz": some(lambda row: moments[row], pa.timestamp("us", tz="Europe/Berlin")),
        "moment_ns": some(lambda row: 1774745999123456789 + row, pa.timestamp("ns")),
        "moment_ms": some(lambda row: row - 10**15, pa.timestamp("ms")),
        "date": some(lambda row: moments[row].date(), pa.date32()),
        "time": some(lambda row: row, pa.time64("us")),
        "duration": some(lambda row: row * 10**9, pa.duration("ns")),
        "decimal": some(lambda row: Decimal(f"-{10**20 + row}.0000000001"), pa.decimal128(38, 10)),
        "big_decimal": some(lambda row: Decimal(10**50 + row), pa.decimal256(60, 0)),
        "binary": some(lambda row: bytes([0, 255, row]), pa.binary()),
        "fixed": some(lambda row: bytes([row]) * 4, pa.binary(4)),
        "large_string": some(lambda row: "\u00e4\U0001f98a\0" * row, pa.large_string()),
        "large_list": some(lambda row: [row, None], pa.large_list(pa.int16())),
        "fixed_list": some(lambda row: [row, row], pa.list_(pa.float32(), 2)),
        "nested": some(lambda row: {"a": None, "b": [{"c": "x"}, None, {"c": None}]}, nested),
        "map": some(lambda row: [("k", row), ("l", None)], pa.map_(pa.string(), pa.int64())),
        "empty_lists": some(lambda row: [[]] * (row % 3), pa.list_(pa.list_(pa.int64()))),
        "nothing": pa.nulls(num_rows, pa.string()),
        "category": some(lambda row: "abc"[row % 3], pa.string()).dictionary_encode(),
    }
    return pa.table(columns)


def check_columns(done: Finished, source: pa.Table, num_samples: int = 1) -> None:
    """Input columns are first, in order, of their types, and bit for bit as they were."""
    table = done.table
    assert table.column_names[: source.num_columns] == source.column_names
    assert table.num_rows == source.num_rows * num_samples
    repeated = source.take([row for row in range(source.num_rows) for _ in range(num_samples)])
    for name in source.column_names:
        found, wanted = table.column(name), repeated.column(name)
        assert found.type == wanted.type, name
        if pa.types.is_dictionary(wanted.type):
            found, wanted = found.cast(pa.string()), wanted.cast(pa.string())
        if pa.types.is_floating(wanted.type):  # a NaN is unlike itself
            bits = pa.int32() if wanted.type == pa.float32() else pa.int64()
            found, wanted = (c.combine_chunks().view(bits) for c in (found, wanted))
        assert found.equals(wanted), name


def check_schemas(done: Finished, *, num_parts: int, **on_request: bool) -> None:
    """Every part has the same schema, whatever is in it: the input's columns, then the results'."""
    parts = sorted(done.run.glob("completions/*.parquet"))
    assert len(parts) == num_parts
    schemas = [pq.read_schema(part) for part in parts]
    for schema in schemas:
        assert schema.equals(schemas[0], check_metadata=True)
    wanted = records.result_fields(**on_request)
    assert list(schemas[0])[-len(wanted) :] == wanted


def test_columns_of_every_type_come_back_bit_for_bit(nightjar: Nightjar, tmp_path: Path) -> None:
    source = every_type()
    path = tmp_path / "input.parquet"
    pq.write_table(source, path)
    done = dummy(nightjar, path, shards__max_rows=5)
    assert done.code == 0, done.err
    check_columns(done, source)
    check_schemas(done, num_parts=3)


def test_all_of_it_at_once_with_samples_logprobs_and_token_ids(
    nightjar: Nightjar, tmp_path: Path
) -> None:
    source = every_type()
    path = tmp_path / "input.parquet"
    pq.write_table(source, path, row_group_size=5)
    done = dummy(
        nightjar,
        path,
        shards__max_rows=5,
        sampling__n=3,
        sampling__temperature=0.7,
        sampling__logprobs=2,
        output__token_ids=True,
    )
    check_columns(done, source, num_samples=3)
    check_schemas(done, num_parts=3, token_ids=True, logprobs=True)
    rows = done.table.drop_columns(source.column_names).to_pylist()
    assert [(row["row_index"], row["sample_index"]) for row in rows] == [
        (row, sample) for row in range(12) for sample in range(3)
    ]
    for row in rows:
        assert len(row["token_ids"]) == len(row["logprobs"]) == row["num_completion_tokens"] > 0
        assert [item["token_id"] for item in row["logprobs"]] == row["token_ids"]
        assert {len(item["top"]) for item in row["logprobs"]} == {2}
    samples = [{row["completion"] for row in rows if row["row_index"] == i} for i in range(12)]
    assert sum(len(found) == 3 for found in samples) > 6, "samples of a row are draws of their own"


def test_parts_of_bad_rows_only_have_the_same_schema(nightjar: Nightjar, tmp_path: Path) -> None:
    path = tmp_path / "input.parquet"
    table = pa.table(
        {"prompt": [None] * 4 + ["a", "b", None, "c"], "note": pa.nulls(8, pa.int64())}
    )
    pq.write_table(table, path)
    done = dummy(nightjar, path, shards__max_rows=4, sampling__logprobs=0, sampling__n=2)
    check_schemas(done, num_parts=2, logprobs=True)
    assert [row["state"] == "invalid_input" for row in done.rows] == [
        *[True] * 8,
        False,
        False,
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert {row["sample_index"] for row in done.rows} == {0, 1}


def test_a_name_that_is_taken_is_refused_with_the_option_that_renames(
    nightjar: Nightjar, tmp_path: Path
) -> None:
    path = tmp_path / "input.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "state": ["BY", "HH"], "error": [1, 2]}), path)
    clash = dummy(nightjar, path)
    assert clash.code == 2
    assert "output.rename" in clash.err
    assert "'state'" in clash.err
    done = dummy(nightjar, path, output__rename={"state": "land", "error": "input_error"})
    assert done.code == 0, done.err
    assert done.table.column_names[:3] == ["prompt", "land", "input_error"]
    assert [row["land"] for row in done.rows] == ["BY", "HH"]
    assert [row["input_error"] for row in done.rows] == [1, 2]


@pytest.mark.parametrize("columns", [["id"], ["note", "id"], []])
def test_only_the_columns_asked_for_are_copied(
    nightjar: Nightjar, tmp_path: Path, columns: list[str]
) -> None:
    path = tmp_path / "input.parquet"
    table = pa.table({"id": [3, 4], "prompt": ["a", "b"], "note": ["x", "y"], "state": ["p", "q"]})
    pq.write_table(table, path)
    done = dummy(nightjar, path, output__columns=columns)
    results = [field.name for field in records.result_fields()]
    found = done.table.column_names
    assert sorted(found[: len(columns)]) == sorted(columns)
    assert found[len(columns) :] == results
    assert [row["row_index"] for row in done.rows] == [0, 1]
    unknown = dummy(nightjar, path, output__columns=["it"])
    assert unknown.code == 2
    assert "'it'" in unknown.err
    assert "note" in unknown.err


def test_columns_set_sampling_per_row_unless_told_not_to(
    nightjar: Nightjar, tmp_path: Path
) -> None:
    path = tmp_path / "input.parquet"
    pq.write_table(
        pa.table(
            {
                "prompt": ["same"] * 5,
                "max_tokens": pa.array([3, None, 5, -1, 4], pa.int32()),
                "ignore_eos": [True] * 5,
            }
        ),
        path,
    )
    done = dummy(nightjar, path, sampling__max_tokens=7)
    rows = done.rows
    assert [row["num_completion_tokens"] for row in rows] == [3, 7, 5, 0, 4]
    assert rows[3]["state"] == "invalid_input"
    assert "max_tokens" in rows[3]["error"]
    assert done.table.column("max_tokens").to_pylist() == [3, None, 5, -1, 4]
    off = dummy(
        nightjar, path, sampling__max_tokens=7, sampling__ignore_eos=True, sampling_columns=[]
    )
    assert [row["num_completion_tokens"] for row in off.rows] == [7] * 5
    assert off.run != done.run


@pytest.mark.parametrize(
    ("mode", "start"), [("error", None), ("truncate_left", "tail"), ("truncate_right", "head")]
)
def test_overlong_prompts_are_refused_or_cut_as_asked(
    nightjar: Nightjar, tmp_path: Path, mode: str, start: str | None
) -> None:
    path = tmp_path / "input.parquet"
    long = "head" + "x" * 100 + "tail"
    pq.write_table(pa.table({"prompt": ["short", long, "also short"]}), path)
    done = dummy(
        nightjar,
        path,
        input__on_overlong=mode,
        input__chat_template="none",
        engine__max_model_len=64,
        sampling__max_tokens=8,
    )
    rows = done.rows
    assert [row["state"] in ("ok", "truncated") for row in rows] == [True, start is not None, True]
    if start is None:
        assert rows[1]["state"] == "overlong"
        assert rows[1]["num_prompt_tokens"] == len(long)
        assert "108" in rows[1]["error"]
        return
    assert rows[1]["num_prompt_tokens"] == 64 - 8
    cut = long[-56:] if start == "tail" else long[:56]
    pq.write_table(pa.table({"prompt": [cut]}), tmp_path / "cut.parquet")
    alone = dummy(
        nightjar,
        tmp_path / "cut.parquet",
        input__chat_template="none",
        engine__max_model_len=64,
        sampling__max_tokens=8,
    )
    assert rows[1]["completion"] == alone.rows[0]["completion"]


ROWS = [{"id": f"r{i}", "prompt": f'question {i}, \u00e4\n"quoted"', "size": i} for i in range(9)]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_openai(rows: list[dict[str, Any]]) -> bytes:
    return as_jsonl(
        [
            {
                "custom_id": row["id"],
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "any", "messages": [{"role": "user", "content": row["prompt"]}]},
            }
            for row in rows
        ]
    )


FILES: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: as_jsonl(ROWS),
    "rows.jsonl.gz": lambda: gzip.compress(as_jsonl(ROWS)),
    "rows.jsonl.zst": lambda: zstandard.compress(as_jsonl(ROWS)),
    "rows.csv": lambda: as_csv(ROWS),
    "rows.csv.zst": lambda: zstandard.compress(as_csv(ROWS)),
    "batch.jsonl": lambda: as_openai(ROWS),
    "batch.jsonl.zst": lambda: zstandard.compress(as_openai(ROWS)),
}


def test_every_format_gives_the_same_answers(nightjar: Nightjar, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    wanted = {
        row["id"]: row["completion"]
        for row in dummy(nightjar, tmp_path / "rows.parquet", shards__max_rows=4).rows
    }
    for name, make in FILES.items():
        (tmp_path / name).write_bytes(make())
        done = dummy(nightjar, tmp_path / name, shards__max_rows=4)
        assert done.code == 0, f"{name}: {done.err}"
        key = "custom_id" if name.startswith("batch") else "id"
        assert {row[key]: row["completion"] for row in done.rows} == wanted, name
        check_schemas(done, num_parts=3)


def test_a_dataset_saved_to_disk_is_an_input(nightjar: Nightjar, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder), num_shards=2)
    done = dummy(nightjar, folder, shards__max_rows=4)
    assert done.code == 0, done.err
    assert [(row["id"], row["size"]) for row in done.rows] == [(r["id"], r["size"]) for r in ROWS]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    peaks = {}
    rng = random.Random(0)
    for name, num_rows in (("small", 100), ("large", 30_000)):
        folder = tmp_path / name
        folder.mkdir()
        blobs = [rng.randbytes(10_000) for _ in range(num_rows)]
        table = pa.table({"prompt": [f"say {row}" for row in range(num_rows)], "blob": blobs})
        # One row group: the worst there is.
        pq.write_table(table, folder / "input.parquet", row_group_size=num_rows)
        with cli_in(folder) as cli:
            job = cli.job(
                name,
                input__uri=str(folder / "input.parquet"),
                shards__max_rows=10_000,
                sampling__max_tokens=8,
            )
            started = time.monotonic()
            process = cli.start("run", str(job), "--json")
            found = [0]
            while process.poll() is None:
                found.append(
                    sum(map(resident_bytes, [process.pid, *children(process.pid, "feed")]))
                )
                time.sleep(0.02)
            assert process.returncode == 0
        peaks[name] = max(found)
        print(f"{name}: {peaks[name] / MiB:.0f} MiB, {time.monotonic() - started:.1f} s")
    assert (tmp_path / "large" / "input.parquet").stat().st_size > 280 * MiB
    assert peaks["large"] - peaks["small"] < 250 * MiB


def resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0
