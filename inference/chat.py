"""Messages and tools as chat templates want them: plain dictionaries, no nulls, content as text.

Takes what a row may hold: a list of dictionaries, a list of key-value pairs (Arrow maps), or JSON text.
Rules, all of them visible to the model's owner:
- null values are dropped at every depth, so rows from Parquet and JSONL give the same prompt;
- a list of text parts becomes their text, joined by newlines; other parts refuse the row;
- a tool result that is an object or a list becomes JSON text.
"""

import json
from typing import Any

from inference.errors import PromptError

Message = dict[str, Any]
_CONTENT_NEEDED = frozenset({"system", "developer", "user", "tool"})


def to_messages(value: object, *, column: str = "messages") -> list[Message]:
    """Return a conversation a chat template can render.

    Raises:
        PromptError: it is null, empty, or a message has no role or unusable content.
    """
    messages = _parse(value, column)
    if not isinstance(messages, list):
        raise _refused(f"column {column!r} is a {_kind(messages)}, need a list of messages")
    if not messages:
        raise _refused(f"column {column!r} has no messages")
    return [_to_message(message, index) for index, message in enumerate(messages)]


def to_tools(value: object, *, column: str = "tools") -> list[dict[str, Any]] | None:
    """Return tool definitions, or None when there are none.

    Raises:
        PromptError: they are not a list of objects.
    """
    if value is None:
        return None
    tools = _parse(value, column)
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise _refused(f"column {column!r} is a {_kind(tools)}, need a list of tools")
    parsed = [_parse(tool, column) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in parsed):
        raise _refused(f"column {column!r} has a tool that is not an object")
    return parsed or None


def drop_nulls(value: object) -> Any:
    """Remove null values from dictionaries at every depth; key-value pairs become dictionaries."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
            return {key: drop_nulls(item) for key, item in value if item is not None}
        return [drop_nulls(item) for item in value]
    return value


def _parse(value: object, column: str) -> Any:
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _refused(f"column {column!r} is text, but not JSON") from None
    if value is None:
        raise _refused(f"column {column!r} is null")
    try:
        return drop_nulls(value)
    except RecursionError:
        raise _refused(f"column {column!r} is nested too deeply") from None


def _to_message(message: object, index: int) -> Message:
    if not isinstance(message, dict):
        raise _refused(f"message {index} is a {_kind(message)}, need an object")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _refused(f"message {index} has no role")
    content = message.get("content")
    if content is None:
        if role in _CONTENT_NEEDED:
            raise _refused(f"message {index} has no content")
        return message
    if isinstance(content, str):
        return message
    return {**message, "content": _to_text(content, role, index)}


def _to_text(content: object, role: str, index: int) -> str:
    if isinstance(content, list):
        texts = [_part_text(part) for part in content]
        if content and all(text is not None for text in texts):
            return "\n".join(text for text in texts if text is not None)
    if role == "tool":
        try:
            return json.dumps(content, ensure_ascii=False)
        except (TypeError, ValueError):
            raise _refused(f"message {index}: the tool result has no JSON form") from None
    if isinstance(content, list):
        kinds = sorted({_part_kind(part) for part in content} - {"text"})
        raise _refused(f"message {index} has content of type {', '.join(kinds) or 'nothing'}")
    raise _refused(f"message {index} has content of type {_kind(content)}, need text")


def _part_text(part: object) -> str | None:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text"):
        text = part.get("text")
        return text if isinstance(text, str) else None
    return None


def _part_kind(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind[:40] if isinstance(kind, str) else _kind(part)


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _refused(message: str) -> PromptError:
    return PromptError("invalid_input", message)
