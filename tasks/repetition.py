"""Completions that run in circles: what a wrong template or a broken model often looks like."""

from collections.abc import Sequence

_LONGEST_PERIOD = 16
_MIN_TOKENS = 32
_MIN_ROUNDS = 4


def is_repetitive(token_ids: Sequence[int]) -> bool:
    """Whether the completion ends in at least four rounds of the same few tokens, 32 tokens or more."""
    count = len(token_ids)
    for period in range(1, _LONGEST_PERIOD + 1):
        tail = max(_MIN_TOKENS, _MIN_ROUNDS * period)
        if count < tail:
            return False
        if token_ids[-1] != token_ids[-1 - period]:
            continue
        if all(
            token_ids[i] == token_ids[i - period]
            for i in range(count - 1, count - tail + period - 1, -1)
        ):
            return True
    return False
