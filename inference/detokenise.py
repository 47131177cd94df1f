"""Detokenise: completion ids to text, stop strings, and the split of reasoning from answer. No torch."""

from collections.abc import Callable, Sequence
from typing import Any

Decode = Callable[[Sequence[int]], str]
"""Ids to text, special tokens skipped."""

BROKEN = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING_TOKENS = 16  # a character spans at most four tokens; more than this is not one
THINK_START, THINK_END = "<think>", "</think>"


def decoder_of(tokenizer: Any) -> Decode:
    """Return the tokenizer's decoding of a whole completion: special tokens skipped, spaces left alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # As a batch of one: only then is the interpreter's lock let go of meanwhile.
        return lambda token_ids: str(
            backend.decode_batch([list(token_ids)], skip_special_tokens=True)[0]
        )
    return lambda token_ids: str(
        tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )


class StopChecker:
    """Watches one completion for stop strings; costs two short decodings per token.

    Text is searched as soon as its characters are whole, whichever tokens it came in.
    """

    def __init__(self, decode: Decode, stop: Sequence[str], min_tokens: int = 0) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_kept = max((len(text) for text in stop), default=1) - 1
        self._token_ids: list[int] = []
        # token_ids[prefix:read] are decoded again with what follows: a token's text depends on those before.
        self._prefix = self._read = 0
        self._prefix_text = ""
        self._tail = ""  # end of the text up to `read`, long enough for a stop string to begin in

    def append(self, token_id: int) -> bool:
        """Return whether a stop string ends in the text this token completes (never below min_tokens)."""
        if not self._stop:
            return False
        self._token_ids.append(token_id)
        window = self._decode(self._token_ids[self._prefix :])
        new_text = window[len(self._prefix_text) :]
        text = self._tail + new_text
        is_found = len(self._token_ids) > self._min_tokens and any(
            text.find(stop, max(0, len(self._tail) - len(stop) + 1)) >= 0 for stop in self._stop
        )
        num_pending = len(self._token_ids) - self._read
        if new_text and (not window.endswith(BROKEN) or num_pending > _MAX_PENDING_TOKENS):
            self._tail = text[-self._num_kept :] if self._num_kept else ""
            self._prefix, self._read = self._read, len(self._token_ids)
            self._prefix_text = self._decode(self._token_ids[self._prefix :])
        return is_found


def finish_text(
    decode: Decode, token_ids: Sequence[int], stop: Sequence[str] = (), min_tokens: int = 0
) -> tuple[str, bool]:
    """Return (text, is_stopped): all ids decoded at once, cut before the first stop string, if any.

    A stop string counts if it ends after the text of the first `min_tokens` tokens. A character that was
    cut off by the end of the completion becomes U+FFFD.
    """
    text = decode(token_ids)
    floor = len(decode(token_ids[:min_tokens])) if stop and min_tokens else 0
    cuts = [
        cut
        for stop_text in stop
        if (cut := text.find(stop_text, max(0, floor - len(stop_text) + 1))) >= 0
    ]
    return (text[: min(cuts)], True) if cuts else (text, False)


def split_reasoning(text: str, is_thinking: bool) -> tuple[str | None, str]:
    """Return (reasoning, completion), both without the tags and otherwise character for character.

    Args:
        text: what the model wrote.
        is_thinking: the prompt ends inside an open `<think>`, so the text begins with reasoning.

    Reasoning that is never closed is all there is: the completion is then empty. Text that does not begin
    with `<think>` (after white space) has no reasoning; it is None.
    """
    opened = text.lstrip()
    if opened.startswith(THINK_START):
        text, is_thinking = opened.removeprefix(THINK_START), True
    if not is_thinking:
        return None, text
    reasoning, _, completion = text.partition(THINK_END)
    return reasoning, completion
