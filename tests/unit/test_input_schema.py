import pyarrow as pa
import pytest

from storage.errors import BadInput
from storage.input_schema import FileSchema, conform, decode_schema, encode_schema, unify


def unified(*schemas):
    files = [FileSchema(f"f{index}", pa.schema(list(s.items()))) for index, s in enumerate(schemas)]
    return unify(files)


MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SWAPPED = pa.struct([("content", pa.string()), ("role", pa.string()), ("name", pa.string())])


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.uint8(), pa.uint64(), pa.uint64()),
        (pa.float64(), pa.float32(), pa.float64()),
        (pa.null(), pa.string(), pa.string()),
        (pa.timestamp("us"), pa.null(), pa.timestamp("us")),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.dictionary(pa.int8(), pa.string()), pa.string_view(), pa.large_string()),
        (pa.list_(pa.null()), pa.list_(pa.int64()), pa.list_(pa.int64())),
        (
            pa.list_(MESSAGE),
            pa.list_(SWAPPED),
            pa.list_(
                pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
            ),
        ),
    ],
    ids=str,
)
def test_compatible_columns_become_one_type(left, right, expected):
    assert unified({"v": left}, {"v": right}).field("v").type == expected


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (pa.int64(), pa.string()),
        (pa.int64(), pa.uint64()),
        (pa.int64(), pa.float64()),
        (pa.timestamp("us"), pa.timestamp("ns")),
        (pa.timestamp("us"), pa.timestamp("us", "UTC")),
        (pa.string(), pa.binary()),
        (pa.list_(pa.int64()), pa.list_(pa.string())),
        (pa.struct([("a", pa.int64())]), pa.struct([("a", pa.string())])),
    ],
    ids=str,
)
def test_incompatible_columns_are_refused_naming_both_files(left, right):
    with pytest.raises(BadInput, match=r"column 'v' is .* in f0 but .* in f1"):
        unified({"v": left}, {"v": right})


def test_columns_keep_their_order_and_hidden_ones_are_left_out():
    found = unified({"b": pa.int64(), "__nightjar_line": pa.int64()}, {"a": pa.int64()})
    assert found.names == ["b", "a"]


def test_file_metadata_does_not_make_schemas_differ():
    field = pa.field("v", pa.int64(), nullable=False, metadata={"PARQUET:field_id": "1"})
    schema = pa.schema([field], metadata={"pandas": "{}"})
    assert unify([FileSchema("f", schema)]) == pa.schema([("v", pa.int64())])
    assert not unify([FileSchema("f", schema)]).metadata


def test_a_schema_survives_text():
    schema = pa.schema([("é", pa.timestamp("ns", "UTC")), ("m", pa.list_(MESSAGE))])
    assert decode_schema(encode_schema(schema)).equals(schema, check_metadata=True)


def conformed(values, source, target, **sources):
    records = pa.RecordBatch.from_arrays([pa.array(values, source)], ["v"])
    schema = pa.schema([("v" if not sources else next(iter(sources)), target)])
    return conform(records, schema, sources, name="f").column(0)


@pytest.mark.parametrize(
    ("values", "source", "target"),
    [
        ([1, None], pa.int32(), pa.int64()),
        ([None, None], pa.null(), pa.list_(MESSAGE)),
        (["x", None], pa.dictionary(pa.int8(), pa.string()), pa.large_string()),
        ([[1], None, []], pa.list_(pa.int32()), pa.list_(pa.int64())),
    ],
    ids=str,
)
def test_values_do_not_change_with_their_type(values, source, target):
    array = conformed(values, source, target)
    assert array.type == target
    assert array.to_pylist() == values


def test_structs_are_reordered_by_name_and_filled_with_null():
    values = [[{"content": "hi", "role": "user"}], None, [], [None]]
    source = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
    target = pa.list_(
        pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    )
    records = pa.RecordBatch.from_arrays([pa.array([[], *values, []], source)], ["v"]).slice(1, 4)
    found = conform(records, pa.schema([("v", target)]), {}, name="f").column(0)
    found.validate(full=True)
    full = {"role": "user", "content": "hi", "name": None}
    assert found.to_pylist() == [[full], None, [], [None]]


def test_a_renamed_column_is_found_under_its_own_name():
    assert conformed([1], pa.int64(), pa.int64(), renamed="v").to_pylist() == [1]


def test_a_missing_column_is_null():
    records = pa.RecordBatch.from_arrays([pa.array([1, 2])], ["a"])
    found = conform(records, pa.schema([("b", pa.string())]), {}, name="f")
    assert found.column(0).to_pylist() == [None, None]
