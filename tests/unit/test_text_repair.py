import struct

import pyarrow as pa
import pytest

from storage.text_repair import repair_text

BAD = b"a\xff\xfeb"
FIXED = "a\ufffd\ufffdb"


def lying_strings(*cells, kind=None):
    """A string array whose bytes are what they are."""
    ends = [0]
    for cell in cells:
        ends.append(ends[-1] + len(cell))
    offsets = struct.pack(f"<{len(ends)}i", *ends)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(cells))]
    return pa.Array.from_buffers(kind or pa.string(), len(cells), buffers)


def repaired(array):
    records = pa.RecordBatch.from_arrays([array, pa.array(range(len(array)))], ["v", "n"])
    found = repair_text(records)
    found.records.validate(full=True)
    assert found.records.schema == records.schema
    return found.records.column(0).to_pylist(), found.bad_rows


def test_valid_text_is_the_same_object():
    records = pa.RecordBatch.from_arrays([pa.array(["x", None, "é"])], ["v"])
    assert repair_text(records).records is records


def test_only_bad_cells_change_and_their_rows_are_named():
    assert repaired(lying_strings(b"ok", BAD, b"")) == (["ok", FIXED, ""], {"v": [1]})


def test_half_a_surrogate_pair_in_utf8_is_bad():
    values, bad_rows = repaired(lying_strings(b"\xed\xa0\x80"))
    assert bad_rows == {"v": [0]}
    assert "\ufffd" in values[0]


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (lambda a: pa.ListArray.from_arrays([0, 1, 2], a), [["ok"], [FIXED]]),
        (lambda a: pa.LargeListArray.from_arrays([0, 1, 2], a), [["ok"], [FIXED]]),
        (lambda a: pa.FixedSizeListArray.from_arrays(a, 1), [["ok"], [FIXED]]),
        (lambda a: pa.StructArray.from_arrays([a], ["s"]), [{"s": "ok"}, {"s": FIXED}]),
        (
            lambda a: pa.MapArray.from_arrays([0, 1, 2], pa.array(["k", "k"]), a),
            [[("k", "ok")], [("k", FIXED)]],
        ),
        (lambda a: pa.DictionaryArray.from_arrays(pa.array([0, 1]), a), ["ok", FIXED]),
        (
            lambda a: pa.ListArray.from_arrays([0, 1, 2], pa.StructArray.from_arrays([a], ["s"])),
            [[{"s": "ok"}], [{"s": FIXED}]],
        ),
    ],
    ids=["list", "large list", "fixed list", "struct", "map", "dictionary", "list of struct"],
)
def test_text_is_repaired_at_any_depth(wrap, expected):
    values, _ = repaired(wrap(lying_strings(b"ok", BAD)))
    assert values == expected


def test_a_slice_is_repaired_by_its_own_rows():
    array = lying_strings(b"x", BAD, b"y", BAD).slice(2, 2)
    assert repaired(array) == (["y", FIXED], {"v": [1]})


def test_nulls_in_a_struct_stay_null():
    array = pa.StructArray.from_arrays(
        [lying_strings(BAD, b"x")], ["s"], mask=pa.array([False, True])
    )
    assert repaired(array)[0] == [{"s": FIXED}, None]
