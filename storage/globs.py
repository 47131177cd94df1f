"""Glob patterns over keys: `*` and `?` stay within a segment, `**` crosses segments."""

import functools
import re
from collections.abc import Callable

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
    """Whether the whole key fits the pattern.

    Raises:
        BadInput: the pattern is none.
    """
    # Where what was matched so far may end. A regular expression would try these one after the other,
    # which takes for ever on many stars.
    ends = {0}
    for step in _steps(pattern):
        ends = step(key, ends)
        if not ends:
            return False
    return len(key) in ends


_Ranges = list[tuple[str, str]]
_Step = Callable[[str, set[int]], set[int]]
"""Given a key and where a match may have come to, where it may be after one more piece of the pattern."""


@functools.cache
def _steps(pattern: str) -> tuple[_Step, ...]:
    steps: list[_Step] = []
    for piece in _PIECE.findall(pattern):
        if piece in _WILD:
            steps.append(_WILD[piece])
        elif len(piece) > 2 and piece[0] == "[":
            inner = piece[1:-1]
            ranges = _ranges(pattern, inner.removeprefix("!"))
            steps.append(functools.partial(_one_of, ranges, not inner.startswith("!")))
        else:
            steps.append(functools.partial(_text, piece))
    return tuple(steps)


_PIECE = re.compile(r"\*\*/|\*\*|\*|\?|\[.[^\]]*\]|\[|[^*?\[]+", re.DOTALL)


def _text(piece: str, key: str, starts: set[int]) -> set[int]:
    return {start + len(piece) for start in starts if key.startswith(piece, start)}


def _one_of(ranges: _Ranges, is_in: bool, key: str, starts: set[int]) -> set[int]:
    return {
        start + 1
        for start in starts
        if start < len(key) and any(low <= key[start] <= high for low, high in ranges) == is_in
    }


def _one(key: str, starts: set[int]) -> set[int]:
    return {start + 1 for start in starts if start < len(key) and key[start] != "/"}


def _within(key: str, starts: set[int]) -> set[int]:
    """Any text of one segment."""
    ends: set[int] = set()
    for start in sorted(starts):
        if start not in ends:
            slash = key.find("/", start)
            ends.update(range(start, (len(key) if slash < 0 else slash) + 1))
    return ends


def _across(key: str, starts: set[int]) -> set[int]:
    """Any text."""
    return set(range(min(starts), len(key) + 1))


def _folders(key: str, starts: set[int]) -> set[int]:
    """Any number of whole segments."""
    first = min(starts)
    return starts | {at + 1 for at in range(first, len(key)) if key[at] == "/"}


_WILD: dict[str, _Step] = {"**/": _folders, "**": _across, "*": _within, "?": _one}


def _ranges(pattern: str, inner: str) -> _Ranges:
    """Return what stands in `[abc]` or `[a-z]`, first and last character of each range."""
    found = re.findall(r"(.)-(.)|(.)", inner, re.DOTALL)
    ranges = [(low or one, high or one) for low, high, one in found]
    if not ranges or any(low > high for low, high in ranges):
        raise BadInput(
            f"{pattern}: not a glob: a range in brackets is empty or the wrong way round"
        )
    return ranges
