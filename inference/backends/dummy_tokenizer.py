"""DummyTokenizer: text to ids and back without a model folder.

0 .. 2      pad, bos, eos (decode to nothing)
3 .. 258    the 256 values of a UTF-8 byte; all that `encode` makes
259 .. 514  words, each with a leading space; all that the dummy backend completes with
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

DUMMY_MODEL_DIR = Path("dummy:")
"""Stands for the dummy's model folder, which does not exist."""

PAD_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID = 0, 1, 2
FIRST_BYTE_ID = 3
FIRST_WORD_ID = FIRST_BYTE_ID + 256
_SYLLABLES = ("ka", "lo", "mi", "nu", "pe", "ra", "so", "ti", "va", "ze", "bo", "du", "fi", "go", "he", "ju")  # fmt: skip
WORDS = tuple(first + second for first in _SYLLABLES for second in _SYLLABLES)
VOCAB_SIZE = FIRST_WORD_ID + len(WORDS)


class DummyTokenizer:
    """UTF-8 bytes shifted past the special tokens, plus the words the dummy backend says."""

    vocab_size = VOCAB_SIZE
    bos_token_id = BOS_TOKEN_ID
    eos_token_id = EOS_TOKEN_ID
    chat_template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )

    def __call__(
        self, texts: Sequence[str], *, add_special_tokens: bool = False
    ) -> Mapping[str, list[list[int]]]:
        """Encode many texts, as transformers tokenizers do; there are no special tokens to add."""
        return {"input_ids": [self.encode(text) for text in texts]}

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> str:
        """Render messages to text in a sandbox."""
        template = _compiled(chat_template or self.chat_template)
        return str(template.render(messages=messages, tools=tools, **kwargs))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return one id per UTF-8 byte; there are no special tokens to add.

        Raises:
            UnicodeEncodeError: the text holds a lone surrogate.
        """
        return [FIRST_BYTE_ID + byte for byte in text.encode("utf-8")]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of the ids; special tokens vanish, broken UTF-8 becomes U+FFFD."""
        pieces = bytearray()
        for token_id in token_ids:
            if not 0 <= token_id < VOCAB_SIZE:
                raise ValueError(f"token id must be 0 to {VOCAB_SIZE - 1}, got {token_id}")
            if token_id >= FIRST_WORD_ID:
                pieces += b" " + WORDS[token_id - FIRST_WORD_ID].encode()
            elif token_id >= FIRST_BYTE_ID:
                pieces.append(token_id - FIRST_BYTE_ID)
        return pieces.decode("utf-8", "replace")


@cache
def _compiled(chat_template: str) -> Any:
    """Compiling takes far longer than rendering a row."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment().from_string(chat_template)
