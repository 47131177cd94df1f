"""Glob patterns over keys: `*` and `?` stay within a segment, `**` crosses segments."""

import functools
import re

from storage.errors import BadInput

_WILDCARD = re.compile(r"[*?\[]")


def has_wildcard(key: str) -> bool:
    """Whether a key is a pattern."""
    return _WILDCARD.search(key) is not None


def literal_prefix(pattern: str) -> str:
    """Return the folder every match lies in, without a trailing slash."""
    match = _WILDCARD.search(pattern)
    literal = pattern[: match.start()] if match else pattern
    return literal.rpartition("/")[0]


def matches(key: str, pattern: str) -> bool:
    """Whether the whole key fits the pattern."""
    return _compiled(pattern).fullmatch(key) is not None


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    pieces = []
    index = 0
    while index < len(pattern):
        char = pattern[index]
        end = pattern.find("]", index + 2) if char == "[" else -1
        if pattern.startswith("**/", index):
            pieces.append("(?:.*/)?")
            index += 3
        elif pattern.startswith("**", index):
            pieces.append(".*")
            index += 2
        elif char == "[" and end > 0:
            pieces.append(_character_class(pattern[index + 1 : end]))
            index = end + 1
        else:
            pieces.append({"*": "[^/]*", "?": "[^/]"}.get(char) or re.escape(char))
            index += 1
    try:
        return re.compile("".join(pieces), re.DOTALL)
    except re.error:
        raise BadInput(
            f"{pattern}: not a glob: a range in brackets is the wrong way round"
        ) from None


def _character_class(inner: str) -> str:
    """Return `[abc]`, `[a-z]` or `[!a]` as a regular expression."""
    negated = inner.startswith("!")
    chars = (char if char == "-" else re.escape(char) for char in inner[negated:])
    return f"[{'^' if negated else ''}{''.join(chars)}]"
