import json
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.convert import ERROR, JSON_PREFIX, LINE, TextSource, convert, convert_arrow
from storage.errors import BadInput

HIDDEN = {ERROR, LINE}


def converted(tmp_path, data, kind="jsonl", **source):
    path, target = tmp_path / f"rows.{kind}", tmp_path / "rows.parquet"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    done = convert(TextSource(path=path, name=path.name, format=kind, **source), target)
    table = pq.read_table(target)
    assert table.num_rows == done.num_rows
    return done, table


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def column(table, name):
    return table.column(name).to_pylist()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([9007199254740993, None, -5], pa.int64()),
        ([0, 2**64 - 1], pa.uint64()),
        ([1, 0.5], pa.float64()),
        ([True, None], pa.bool_()),
        (["x", None], pa.string()),
        ([None, None], pa.null()),
        ([[1], [], None], pa.list_(pa.int64())),
        ([{"a": 1}, {"b": "x"}], pa.struct([("a", pa.int64()), ("b", pa.string())])),
    ],
)
def test_consistent_values_keep_an_exact_type(tmp_path, values, kind):
    _, table = converted(tmp_path, lines(*({"v": value} for value in values)))
    assert table.schema.field("v").type == kind
    found = column(table, "v")
    if pa.types.is_struct(kind):
        found = [{k: v for k, v in value.items() if v is not None} for value in found]
    assert found == values


@pytest.mark.parametrize(
    "values",
    [
        ["x", 1],
        [1, True],
        [{"a": 1}, {"a": "x"}],
        [{"a": 1}, {}],
        [[1], {"a": 1}],
        [2**64],
        [2**60, 0.5],
        [{str(n): n for n in range(300)}],
        [[[1]], [["x"]]],
    ],
)
def test_mixed_values_become_json_text_that_loses_nothing(tmp_path, values):
    _, table = converted(tmp_path, lines(*({"v": value} for value in values)))
    assert table.schema.field("v").type == pa.string()
    assert [json.loads(text) for text in column(table, "v")] == values


def test_used_columns_keep_their_exact_json_beside_the_struct(tmp_path):
    rows = [{"m": {"b": 1, "a": None}}, {"m": {"a": 2, "c": 3}}, {}]
    _, table = converted(tmp_path, lines(*rows), used=frozenset({"m"}))
    raw = column(table, JSON_PREFIX + "m")
    assert [text and list(json.loads(text).items()) for text in raw] == [
        [("b", 1), ("a", None)],
        [("a", 2), ("c", 3)],
        None,
    ]


def test_unused_and_plain_columns_are_not_kept_twice(tmp_path):
    _, table = converted(tmp_path, lines({"m": {"a": 1}, "p": "x"}), used=frozenset({"p"}))
    assert set(table.schema.names) == {"m", "p", *HIDDEN}


def test_half_a_pair_costs_its_row_only_where_it_is_used(tmp_path):
    data = '{"p": "bad \\ud835", "q": "ok"}\n{"p": "ok", "q": {"x": ["bad \\udcb2"]}}'
    done, table = converted(tmp_path, data, used=frozenset({"p"}))
    assert done.num_replaced == 2
    assert column(table, "p") == ["bad \ufffd", "ok"]
    errors = column(table, ERROR)
    assert "'p'" in errors[0]
    assert errors[1] is None
    table.column("q").combine_chunks().validate(full=True)


def test_rows_know_their_lines(tmp_path):
    _, table = converted(tmp_path, '\n{"a": 1}\n\n{"a": 2}')
    assert column(table, LINE) == [2, 4]


def test_a_malformed_line_refuses_the_file_by_line(tmp_path):
    with pytest.raises(BadInput, match=r"rows\.jsonl: line 2: not JSON .* skip_with_error_rows"):
        converted(tmp_path, '{"a": 1}\n{oops\n')


def test_a_malformed_line_can_be_one_error_row(tmp_path):
    done, table = converted(tmp_path, '{"a": 1}\n{oops\n{"a": 3}\n', skip_bad=True)
    assert (done.num_rows, done.num_bad_rows) == (3, 1)
    assert column(table, "a") == [1, None, 3]
    assert [error is None for error in column(table, ERROR)] == [True, False, True]


def test_rows_without_any_columns_are_still_rows(tmp_path):
    done, _ = converted(tmp_path, "{}\n{}\n")
    assert done.num_rows == 2


@pytest.mark.parametrize("key", ["\\ud835", "a\\u0000b", "__nightjar_line"])
def test_a_key_that_cannot_be_a_column_is_refused(tmp_path, key):
    with pytest.raises(BadInput, match="cannot be a column name"):
        converted(tmp_path, f'{{"{key}": 1}}')


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["9007199254740993", "", "-5"], pa.int64(), [9007199254740993, None, -5]),
        (["0.5", "", "1.0"], pa.float64(), [0.5, None, 1.0]),
        (["007", "1"], pa.string(), ["007", "1"]),
        (["1.10", "2.5"], pa.string(), ["1.10", "2.5"]),
        (["1", "0.5"], pa.string(), ["1", "0.5"]),
        (["nan", "1.0"], pa.string(), ["nan", "1.0"]),
        (["1e5"], pa.string(), ["1e5"]),
        (["9223372036854775808"], pa.string(), ["9223372036854775808"]),
        (["x", ""], pa.string(), ["x", ""]),
        (["\u0661"], pa.string(), ["\u0661"]),
    ],
)
def test_csv_numbers_are_numbers_only_where_that_is_exact(tmp_path, cells, kind, values):
    data = "v,w\n" + "".join(f"{cell},x\n" for cell in cells)
    _, table = converted(tmp_path, data, kind="csv")
    assert table.schema.field("v").type == kind
    assert column(table, "v") == values


def test_a_csv_prompt_of_digits_stays_text(tmp_path):
    _, table = converted(tmp_path, "p,q\n5,5\n", kind="csv", text=frozenset({"p"}))
    assert (column(table, "p"), column(table, "q")) == (["5"], [5])


def test_csv_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path):
    done, table = converted(tmp_path, b"p,q\ncaf\xe9,x\n", kind="csv", used=frozenset({"p"}))
    assert done.num_replaced == 1
    assert column(table, "p") == ["caf\ufffd"]
    assert column(table, ERROR)[0] is not None


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_files_and_streams_become_parquet(tmp_path, new):
    table = pa.table({"a": [1, None], "s": [{"x": 1}, None]})
    with new(tmp_path / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    assert convert_arrow(tmp_path / "d.arrow", tmp_path / "d.parquet", name="d").num_rows == 2
    assert pq.read_table(tmp_path / "d.parquet").equals(table)


@pytest.mark.parametrize("data", [b"", b"ARROW1nonsense", b"nonsense"])
def test_a_broken_arrow_file_is_refused(tmp_path, data):
    (tmp_path / "d.arrow").write_bytes(data)
    with pytest.raises(BadInput, match="not a readable Arrow file"):
        convert_arrow(tmp_path / "d.arrow", tmp_path / "d.parquet", name="d")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


def without_nulls(value):
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


@given(values=st.lists(VALUES, min_size=1, max_size=5))
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_json_survives_conversion_but_for_nulls_in_structs(tmp_path, values):
    rows = [{"v": value} for value in values]
    _, table = converted(tmp_path, lines(*rows), used=frozenset({"v"}))
    found = column(table, "v")
    is_text = table.schema.field("v").type == pa.string()
    if is_text and not all(value is None or isinstance(value, str) for value in values):
        found = [None if text is None else json.loads(text) for text in found]
        assert found == values
    assert without_nulls(found) == without_nulls(values)
    if JSON_PREFIX + "v" in table.schema.names:
        raw = [None if t is None else json.loads(t) for t in column(table, JSON_PREFIX + "v")]
        assert raw == values


def test_arrow_offsets_that_lead_nowhere_are_refused(tmp_path):
    sink = pa.BufferOutputStream()
    table = pa.table({"prompt": ["abcde", "fgh"]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data, offsets = sink.getvalue().to_pybytes(), struct.pack("<iii", 0, 5, 8)
    assert data.count(offsets) == 1
    path = tmp_path / "rows.arrow"
    path.write_bytes(data.replace(offsets, struct.pack("<iii", 0, 2**31 - 1, 8)))
    with pytest.raises(BadInput, match=r"rows\.arrow: not a readable Arrow file"):
        convert_arrow(path, tmp_path / "out.parquet", name="rows.arrow")


def test_arrow_rows_without_a_column_are_refused_not_dropped(tmp_path):
    batch = pa.RecordBatch.from_struct_array(pa.array([{}] * 2, pa.struct([])))
    path = tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(BadInput, match=r"rows\.arrow: .*2 rows without a column"):
        convert_arrow(path, tmp_path / "out.parquet", name="rows.arrow")
