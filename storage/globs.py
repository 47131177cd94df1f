"""Glob patterns over keys: `*` and `?` stay within a segment, `**` crosses segments."""

import functools
import re

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
            inner = pattern[index + 1 : end].replace("\\", "\\\\")
            inner = f"^{inner[1:]}" if inner.startswith("!") else inner
            pieces.append(f"[{inner}]")
            index = end + 1
        else:
            pieces.append({"*": "[^/]*", "?": "[^/]"}.get(char) or re.escape(char))
            index += 1
    return re.compile("".join(pieces), re.DOTALL)
