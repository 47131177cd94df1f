"""Stop strings, looked for only where one can end: which tokens can end one is known beforehand. No torch.

A stop string ends in a token whose text holds it, or begins with its end. Most tokens of a vocabulary do neither, so
most steps decode nothing. What a token can end is judged generously; the text decoded as a whole decides.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from inference.detokenise import BROKEN, Decode, decoder_of

_MAX_SETS = 256
"""Sets of stop strings that are remembered; each takes a byte for every token of the vocabulary."""

_BY_BYTE = "ByteLevel"
_BY_TOKEN = frozenset({_BY_BYTE, "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"})
"""Decoders that put texts of tokens side by side, but for the first one's space and characters in several tokens."""

_MARGIN = 8
"""Tokens, and characters, beyond the longest stop string: the first of a window may be cut, or miss a space."""

_MAX_BYTES = 3
"""Replacement characters at the end of a text whose last character is not whole yet."""


class StopWatch:
    """One set of stop strings and the tokens that can end one."""

    def __init__(
        self, decode: Decode, stop: Sequence[str], texts: Sequence[str], can_end: Any
    ) -> None:
        """`texts` [V] is what tokens add to a text; `can_end` [V+1] of bools, the last for tokens that are none."""
        self._decode = decode
        self._stop = tuple(stop)
        self._texts = texts
        self.can_end = can_end
        self._num_chars = max(map(len, stop))
        self.num_tail_tokens = self._num_chars + _MARGIN
        """Tokens that `is_near` looks at."""

    def may_end(self, token_id: int) -> bool:
        """Whether a stop string may end in this token's text."""
        return bool(self.can_end[min(token_id, len(self.can_end) - 1)])

    def is_near(self, token_ids: Sequence[int]) -> bool:
        """Whether a stop string is in the text of the last tokens, or that cannot be said without those before."""
        tail = token_ids[-self.num_tail_tokens :]
        text, needed = "", 0
        for token_id in reversed(tail):
            piece = self._texts[token_id] if token_id < len(self._texts) else ""
            if BROKEN in piece:
                return self._is_near_decoded(tail)
            text = piece + text
            needed = needed or len(text) + self._num_chars - 1
            if len(text) >= needed:
                break
        else:
            if len(tail) == self.num_tail_tokens:
                return True  # tokens without text: unlikely enough for the whole text to be decoded
        return any(stop in text for stop in self._stop)

    def _is_near_decoded(self, tail: Sequence[int]) -> bool:
        """The same where a character lies in several tokens."""
        text = self._decode(tail)
        if any(stop in text for stop in self._stop):
            return True
        if len(tail) < self.num_tail_tokens:
            return False
        whole = text.rstrip(BROKEN)
        is_whole = len(text) - len(whole) <= _MAX_BYTES and BROKEN not in whole[_MARGIN:]
        return not is_whole or len(whole) < self.num_tail_tokens


class StopStrings:
    """The watches of one tokenizer, made when a row first asks."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decode = decoder_of(tokenizer)
        self._pieces: list[tuple[str, str]] | None = None
        self._texts: list[str] = []
        self._watches: dict[tuple[str, ...], StopWatch] = {}

    def watch_of(self, stop: tuple[str, ...]) -> StopWatch | None:
        """Return the watch of a set; None where texts of tokens do not simply follow each other, or of too many sets."""
        watch = self._watches.get(stop)
        if watch is not None or len(self._watches) >= _MAX_SETS:
            return watch
        if any(BROKEN in text for text in stop):
            return None
        if self._pieces is None:
            self._pieces = _pieces(self._tokenizer, self._decode)
            self._texts = [later for _, later in self._pieces]
        if not self._pieces:
            return None
        can_end = np.array([*(_can_end(piece, stop) for piece in self._pieces), False])
        watch = self._watches[stop] = StopWatch(self._decode, stop, self._texts, can_end)
        return watch


class StopSlots:
    """Which tokens can end a stop string of each slot's sequence."""

    def __init__(self, num_slots: int) -> None:
        self._set_of: Any = np.zeros(num_slots, np.int32)
        self._index: dict[int, int] = {}
        self._can_end: Any = np.zeros((1, 1), bool)  # the first set has no stop string

    def set(self, slot: int, watch: StopWatch | None) -> None:
        """Begin a sequence in a slot; None: it has no stop strings, or is looked at in every step."""
        if watch is None:
            self._set_of[slot] = 0
            return
        index = self._index.get(id(watch))
        if index is None:
            index = self._index[id(watch)] = len(self._can_end)
            wider = np.zeros((index + 1, len(watch.can_end)), bool)
            wider[:index, : self._can_end.shape[1]] = self._can_end
            wider[index] = watch.can_end
            self._can_end = wider
        self._set_of[slot] = index

    def candidates(self, slots: Any, token_ids: Any) -> list[int]:
        """Return the places, in these arrays, of tokens that can end a stop string; negative ones are no tokens."""
        sets = self._set_of[slots]
        if not sets.any():
            return []
        last = self._can_end.shape[1] - 1
        known = np.minimum(token_ids.view(np.uint32), last)  # negative ones become the largest
        found: list[int] = np.flatnonzero(self._can_end[sets, known]).tolist()
        return found


def _pieces(tokenizer: Any, decode: Decode) -> list[tuple[str, str]]:
    """Return the texts each token may have, at the beginning and later on; none where that depends on more."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kinds = _decoders(getattr(backend, "decoder", None))
    if not kinds or not kinds <= _BY_TOKEN:
        return []
    size = int(tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True))
    first = [decode([token_id]) for token_id in range(size)]
    if kinds == {_BY_BYTE}:
        return [(text, text) for text in first]
    anchor = next((i for i, text in enumerate(first) if text.isalpha() and text.isascii()), None)
    if anchor is None:
        return []
    begin = len(first[anchor])
    later = [decode([anchor, token_id])[begin:] for token_id in range(size)]
    return list(zip(first, later, strict=True))


def _decoders(decoder: Any) -> set[str]:
    """Return the kinds that a tokenizer's decoder is made of; none if it does not say."""
    if decoder is None:
        return set()
    values = json.loads(decoder.__getstate__())
    parts = values["decoders"] if values["type"] == "Sequence" else [values]
    return {part["type"] for part in parts}


def _can_end(piece: tuple[str, str], stop: Sequence[str]) -> bool:
    return any(
        BROKEN in text or any(whole[-1] in text and _ends_in(text, whole) for whole in stop)
        for text in set(piece)
    )


def _ends_in(text: str, stop: str) -> bool:
    """Whether a stop string may end in a text, whatever comes before it."""
    return stop in text or any(
        stop.endswith(text[:end]) for end in range(1, min(len(text), len(stop) - 1) + 1)
    )
