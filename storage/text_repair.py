"""Strings in Arrow arrays that are not UTF-8: found, and replaced so that outputs stay readable."""

from typing import Any, NamedTuple

import pyarrow as pa


class Repaired(NamedTuple):
    """A batch whose strings are all valid, and where they were not."""

    records: pa.RecordBatch
    bad_rows: dict[str, list[int]]  # column -> rows of the batch


def repair_text(records: pa.RecordBatch) -> Repaired:
    """Replace bytes that are not UTF-8 in string columns by U+FFFD, at every depth."""
    arrays, bad_rows = [], {}
    for name, array in zip(records.schema.names, records.columns, strict=True):
        if _has_text(array.type) and not _is_valid(array):
            bad_rows[name] = [
                row for row in range(len(array)) if not _is_valid(array.slice(row, 1))
            ]
            array = _repair(array)
        arrays.append(array)
    if not bad_rows:
        return Repaired(records, {})
    return Repaired(pa.RecordBatch.from_arrays(arrays, schema=records.schema), bad_rows)


def _is_valid(array: pa.Array) -> bool:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _has_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _has_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _has_text(kind.value_type)
    if pa.types.is_nested(kind):
        return any(_has_text(kind.field(index).type) for index in range(kind.num_fields))
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _repair(array: Any) -> Any:
    kind = array.type
    if not _has_text(kind):
        return array
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _repair(array.storage))
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(array.indices, _repair(array.dictionary))
    if pa.types.is_struct(kind):
        children = [_repair(array.field(index)) for index in range(kind.num_fields)]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    if pa.types.is_nested(kind):
        return _repair_list(array)
    binary = array.cast(pa.large_binary()).to_pylist()
    texts = [None if cell is None else cell.decode("utf-8", "replace") for cell in binary]
    return pa.array(texts, kind)


def _repair_list(array: Any) -> Any:
    """Rebuild list, large list, fixed-size list or map from Python values with repaired strings."""
    bytes_type = _as_bytes(array.type)
    return pa.array(_decoded(array.cast(bytes_type).to_pylist()), array.type)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_map(kind):
        return pa.map_(_as_bytes(kind.key_type), _as_bytes(kind.item_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_as_bytes(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_as_bytes(kind.value_type), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _as_bytes(f.type)) for f in kind])
    return pa.large_binary() if _has_text(kind) else kind


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_decoded(item) for item in value)
    return value
