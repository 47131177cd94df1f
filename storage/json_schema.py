"""The Arrow type of a JSON column, inferred over every value of it.

Integers stay exact: int64, else uint64. Integers beside fractions become float64 only where that is
exact. Objects become structs and lists lists where every value agrees; anything mixed, an empty
object, or more than MAX_FIELDS keys makes the whole column JSON text (`arrow_type` returns None).
"""

from typing import Any

import pyarrow as pa

MAX_FIELDS = 200
MAX_DEPTH = 24
_EXACT_FLOAT = 2**53


class JsonType:
    """What has been seen at one place of a column."""

    __slots__ = ("fields", "high", "is_mixed", "item", "kinds", "low")

    def __init__(self) -> None:
        self.kinds: set[type] = set()
        self.low = 0
        self.high = 0
        self.item: JsonType | None = None
        self.fields: dict[str, JsonType] = {}
        self.is_mixed = False

    def observe(self, value: Any, depth: int = 0) -> None:
        """Take one value into account."""
        if value is None or self.is_mixed:
            return
        kind = type(value)
        self.kinds.add(kind)
        if kind is int:
            self.low = min(self.low, value)
            self.high = max(self.high, value)
        elif kind is list:
            self._observe_list(value, depth)
        elif kind is dict:
            self._observe_object(value, depth)

    def _observe_list(self, value: list[Any], depth: int) -> None:
        if depth >= MAX_DEPTH:
            self.is_mixed = True
            return
        if self.item is None:
            self.item = JsonType()
        for item in value:
            self.item.observe(item, depth + 1)

    def _observe_object(self, value: dict[str, Any], depth: int) -> None:
        if depth >= MAX_DEPTH or not value:
            self.is_mixed = True
            return
        for key, item in value.items():
            field = self.fields.get(key)
            if field is None:
                if len(self.fields) >= MAX_FIELDS or not _is_name(key):
                    self.is_mixed = True
                    return
                field = self.fields[key] = JsonType()
            field.observe(item, depth + 1)

    def arrow_type(self) -> pa.DataType | None:
        """Return the type that holds every value exactly, or None for JSON text."""
        if self.is_mixed:
            return None
        if not self.kinds:
            return pa.null()
        if len(self.kinds) > 1:
            return self._number() if self.kinds == {int, float} else None
        (kind,) = self.kinds
        if kind is int:
            return self._integer()
        if kind is list:
            item = self.item.arrow_type() if self.item else pa.null()
            return None if item is None else pa.list_(item)
        if kind is dict:
            return self._struct()
        return {bool: pa.bool_(), float: pa.float64(), str: pa.string()}[kind]

    def _integer(self) -> pa.DataType | None:
        if self.low >= -(2**63) and self.high < 2**63:
            return pa.int64()
        return pa.uint64() if self.low == 0 and self.high < 2**64 else None

    def _number(self) -> pa.DataType | None:
        is_exact = self.low >= -_EXACT_FLOAT and self.high <= _EXACT_FLOAT
        return pa.float64() if is_exact else None

    def _struct(self) -> pa.DataType | None:
        types = {name: field.arrow_type() for name, field in self.fields.items()}
        if any(item is None for item in types.values()):
            return None
        return pa.struct(list(types.items()))


def _is_name(key: str) -> bool:
    """Whether Arrow and Parquet can carry the key as a field name."""
    return "\0" not in key and not any("\ud800" <= char <= "\udfff" for char in key)
