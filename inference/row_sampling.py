"""Per-row sampling: values from columns named like `SamplingParams` fields override the run's.

A null (or empty text, which is CSV's null) keeps the run's value. `n` and `logprobs` shape the
output and stay the run's.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from inference.errors import PromptError
from inference.sampling import SamplingParams

RUN_WIDE = frozenset({"n", "logprobs"})
ROW_FIELDS = tuple(
    field.name for field in dataclasses.fields(SamplingParams) if field.name not in RUN_WIDE
)

_INTEGERS = frozenset({"max_tokens", "min_tokens", "top_k", "seed"})
_FLAGS = {"true": True, "false": False, "1": True, "0": False}


def row_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields a row sets, in their proper types; range checks are `SamplingParams`' own.

    Raises:
        PromptError: a value is not of its field's kind.
    """
    return {
        name: _coerce(name, value)
        for name, value in values.items()
        if value is not None and value != ""
    }


def row_sampling(run: SamplingParams, overrides: Mapping[str, Any]) -> SamplingParams:
    """Return the run's sampling with a row's overrides.

    Raises:
        PromptError: the result is outside what `SamplingParams` accepts.
    """
    if not overrides:
        return run
    try:
        return dataclasses.replace(run, **overrides)
    except ValueError as error:
        raise PromptError("invalid_input", f"sampling: {error}") from None


def _coerce(name: str, value: object) -> Any:
    if name == "stop":
        return _strings(name, value)
    if name == "stop_token_ids":
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_integer(name, item) for item in items)
    if name == "ignore_eos":
        flag = _FLAGS.get(str(value).lower())
        if flag is None:
            raise _refused(name, "true or false", value)
        return flag
    return _integer(name, value) if name in _INTEGERS else _number(name, value)


def _strings(name: str, value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise _refused(name, "a string or a list of strings", value)
    return tuple(items)


def _integer(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(name, value)
    if not number.is_integer():
        raise _refused(name, "a whole number", value)
    return int(number)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _refused(name, "a number", value)
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _refused(name, "a number", value) from None
    if not math.isfinite(number):
        raise _refused(name, "a finite number", value)
    return number


def _refused(name: str, need: str, value: object) -> PromptError:
    return PromptError("invalid_input", f"{name} must be {need}, got a {type(value).__name__}")
