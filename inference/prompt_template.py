"""PromptTemplate: `Summarise: {text}` over a row's columns, without attribute access or surprises."""

import datetime
import decimal
import json
import re
import string
from collections.abc import Collection, Mapping
from typing import Any

from inference.errors import EngineConfigError, PromptError, printable

MAX_FORMAT_WIDTH = 9999
_DIGITS = re.compile(r"\d+")
_PLAIN = (bool, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta)


class PromptTemplate:
    """Text with `{column}` or `{column:format}` fields; `{{` and `}}` stand for braces.

    A field names one column exactly; `{a.b}` is the column called `a.b`, never an attribute.
    """

    def __init__(self, text: str) -> None:
        """Parse the template.

        Raises:
            EngineConfigError: a brace is open, a field is empty, or it has `!r` or a nested field.
        """
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise EngineConfigError(
                f"input.prompt: {error}; write {{{{ and }}}} for literal braces"
            ) from None
        self._parts = [(literal, name, spec or "") for literal, name, spec, _ in parsed]
        for _, name, spec, conversion in parsed:
            if name is not None:
                _check_field(name, spec or "", conversion)
        self.fields = tuple(dict.fromkeys(name for _, name, _ in self._parts if name is not None))

    def missing(self, columns: Collection[str]) -> list[str]:
        """Return the fields that are not among these columns."""
        return [name for name in self.fields if name not in columns]

    def render(self, row: Mapping[str, Any]) -> str:
        """Fill the fields from a row.

        Raises:
            PromptError: a value is null, is not text where bytes were given, or refuses its format.
        """
        pieces = []
        for literal, name, spec in self._parts:
            pieces.append(literal)
            if name is not None:
                pieces.append(_format(name, row[name], spec))
        return "".join(pieces)


def _check_field(name: str, spec: str, conversion: str | None) -> None:
    shown, spec_shown = printable(name), printable(spec)
    if not name:
        raise EngineConfigError("input.prompt has an empty field {}; name a column, or write {{}}")
    if conversion is not None:
        raise EngineConfigError(
            f"input.prompt: {{{shown}!{printable(conversion)}}} is not supported; drop it"
        )
    if "{" in spec or "}" in spec:
        raise EngineConfigError(f"input.prompt: the format of {{{shown}}} must not hold a field")
    if any(int(digits) > MAX_FORMAT_WIDTH for digits in _DIGITS.findall(spec)):
        raise EngineConfigError(
            f"input.prompt: the width of {{{shown}:{spec_shown}}} must be at most {MAX_FORMAT_WIDTH}"
        )


def _format(name: str, value: object, spec: str) -> str:
    if value is None:
        raise PromptError("invalid_input", f"column {name!r} is null, and the prompt uses it")
    if isinstance(value, bytes):
        value = decode(name, value)
    if isinstance(value, (list, tuple, dict)):
        value = to_json_text(name, value)
    if not isinstance(value, (str, *_PLAIN)):
        value = str(value)
    if not spec:
        return str(value)
    try:
        return format(value, spec)
    except (ValueError, TypeError, OverflowError):
        raise PromptError(
            "invalid_input",
            f"column {name!r}: a {type(value).__name__} cannot take the format {spec!r}",
        ) from None


def decode(name: str, value: bytes) -> str:
    """Return UTF-8 bytes as text.

    Raises:
        PromptError: they are not UTF-8.
    """
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise PromptError(
            "invalid_input", f"column {name!r} is not UTF-8 at byte {error.start}"
        ) from None


def to_json_text(name: str, value: object) -> str:
    """Return a nested value as JSON text, non-ASCII kept.

    Raises:
        PromptError: it holds something that JSON has no form for.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(
            "invalid_input", f"column {name!r} has no JSON form: {type(error).__name__}"
        ) from None
