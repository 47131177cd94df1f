"""One schema for all input files, and batches brought into it without changing a value.

Allowed to differ between files: a column that some files lack, a null column, integer width of equal
sign, string beside large string, and fields of structs. Anything else is refused by name.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from storage.convert import HIDDEN
from storage.errors import BadInput

_FIELD_ID = b"PARQUET:field_id"


class FileSchema(NamedTuple):
    """One input file's own columns."""

    name: str
    schema: pa.Schema


def unify(files: Sequence[FileSchema]) -> pa.Schema:
    """Return the schema all files fit, columns in order of first appearance, hidden ones left out.

    Raises:
        BadInput: two files disagree on a column; names both and the column.
    """
    found: dict[str, tuple[pa.Field, str]] = {}
    for name, schema in files:
        for field in schema:
            if field.name.startswith(HIDDEN):
                continue
            field = _plain(field)
            if field.name not in found:
                found[field.name] = (field, name)
                continue
            before, where = found[field.name]
            merged = _merge(before.type, field.type)
            if merged is None:
                raise BadInput(
                    f"column {field.name!r} is {before.type} in {where} but {field.type} in {name}; "
                    "convert one, or run them apart"
                )
            if merged != before.type:
                found[field.name] = (before.with_type(merged), name)
    return pa.schema([field for field, _ in found.values()])


def conform(
    records: pa.RecordBatch, schema: pa.Schema, sources: Mapping[str, str], *, name: str
) -> pa.RecordBatch:
    """Return the batch with exactly `schema`'s columns; `sources` maps its names to the file's own.

    Raises:
        BadInput: a value does not fit its column's type after all.
    """
    arrays = []
    for field in schema:
        index = records.schema.get_field_index(sources.get(field.name, field.name))
        if index < 0:
            arrays.append(pa.nulls(records.num_rows, field.type))
            continue
        array = records.column(index)
        try:
            arrays.append(array if array.type == field.type else _convert(array, field.type))
        except (pa.ArrowException, ValueError) as error:
            reason = type(error).__name__
            raise BadInput(
                f"{name}: column {field.name!r} does not fit {field.type}: {reason}"
            ) from None
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def encode_schema(schema: pa.Schema) -> str:
    """Return the schema as text: base64 of its Arrow IPC form."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def decode_schema(text: str) -> pa.Schema:
    """Read back what `encode_schema` wrote."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def _plain(field: pa.Field) -> pa.Field:
    """Drop what concerns the file, not the data; keep extension names."""
    metadata = {k: v for k, v in (field.metadata or {}).items() if k != _FIELD_ID}
    return pa.field(field.name, field.type, nullable=True, metadata=metadata or None)


def _merge(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """Return a type that holds the values of both unchanged, or None."""
    if left == right or pa.types.is_null(right):
        return left
    if pa.types.is_null(left):
        return right
    if _is_text(left) and _is_text(right):
        return pa.large_string()
    for is_kind in (pa.types.is_signed_integer, pa.types.is_unsigned_integer):
        if is_kind(left) and is_kind(right):
            return left if left.bit_width >= right.bit_width else right
    if pa.types.is_float32(left) and pa.types.is_float64(right):
        return right
    if pa.types.is_float64(left) and pa.types.is_float32(right):
        return left
    if pa.types.is_list(left) and pa.types.is_list(right):
        item = _merge(left.value_type, right.value_type)
        return None if item is None else pa.list_(item)
    if pa.types.is_struct(left) and pa.types.is_struct(right):
        return _merge_structs(left, right)
    return None


def _merge_structs(left: pa.StructType, right: pa.StructType) -> pa.DataType | None:
    types = {field.name: field.type for field in left}
    if len(types) != left.num_fields or len({field.name for field in right}) != right.num_fields:
        return None
    for field in right:
        merged = _merge(types[field.name], field.type) if field.name in types else field.type
        if merged is None:
            return None
        types[field.name] = merged
    return pa.struct([pa.field(name, kind) for name, kind in types.items()])


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _convert(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Convert within what `_merge` allows; nested values are rebuilt where Arrow has no cast."""
    if pa.types.is_struct(kind):
        fields = {field.name: index for index, field in enumerate(array.type)}
        mask = array.is_null()
        children = [
            _convert(array.field(fields[field.name]), field.type)
            if field.name in fields
            else pa.nulls(len(array), field.type)
            for field in kind
        ]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=mask)
    if pa.types.is_list(kind) and pa.types.is_list(array.type):
        first = array.offsets[0].as_py() if len(array) else 0
        last = array.offsets[-1].as_py() if len(array) else 0
        values = _convert(array.values.slice(first, last - first), kind.value_type)
        offsets = pc.subtract(array.offsets, pa.scalar(first, pa.int32()))
        return pa.ListArray.from_arrays(offsets, values, type=kind, mask=array.is_null())
    return array.cast(kind)
