"""PromptBuilder: a row's text or messages become token ids, exactly as the model was trained to see them.

What decides the tokens:
- a chat template in force: text is sent as one user message; the template alone writes special tokens;
- `none`: text goes in as it is, with the tokenizer's own special tokens, never two BOS in a row;
- empty and blank text runs under a chat template; raw text of zero tokens is `invalid_input`.

A prompt must be shorter than max_model_len, so that at least one completion token fits. Truncation,
when asked for, leaves room for the row's max_tokens, up to half of max_model_len.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from inference.chat import to_messages, to_tools
from inference.chat_template import RowLimit, choose_template, load_tokenizer
from inference.errors import EngineConfigError, InferenceError, PromptError
from inference.model_config import vocab_size_of

MAX_RENDERED_CHARS = 32 * 1024 * 1024

OnOverlong = Literal["error", "truncate_left", "truncate_right"]

_THINK = "<think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """How prompts are made; equal configs on equal models give equal tokens."""

    max_model_len: int
    chat_template: str = "auto"
    """auto, none, a Jinja file, or the template itself (anything with `{{` or `{%`)."""

    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    on_overlong: OnOverlong = "error"
    allowed_code: tuple[str, ...] = ()
    """As in `EngineConfig`."""

    has_messages: bool = False
    """Whether rows hold messages, which only a chat template can turn into text."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given for one row."""

    token_ids: list[int]
    num_tokens: int
    """Before any truncation."""

    is_thinking: bool
    """The prompt ends inside an open `<think>`, so the completion starts with reasoning."""

    is_truncated: bool


class PromptBuilder:
    """Renders and tokenises. Built once per process; not thread-safe."""

    def __init__(self, model_dir: Path, config: PromptConfig) -> None:
        """Load the tokenizer and settle the chat template.

        Raises:
            ModelError: the folder has no usable tokenizer, or one that needs its own code.
            EngineConfigError: the chat template is missing, unreadable or wrong.
        """
        self.config = config
        self._tokenizer = load_tokenizer(model_dir, config.allowed_code)
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        self._num_known = _num_known(model_dir, self._tokenizer)
        if self._backend is not None:
            self._backend.no_padding()
            self._backend.no_truncation()
        self._template = choose_template(
            self._tokenizer,
            model_dir,
            choice=config.chat_template,
            kwargs=config.chat_template_kwargs,
            has_messages=config.has_messages,
        )
        self.warnings = self._template.warnings(config.chat_template_kwargs)
        if self.is_chat:
            self._try_template()

    @property
    def is_chat(self) -> bool:
        """Whether a chat template is in force."""
        return self._template.source is not None

    def render_text(self, text: object, *, column: str = "prompt") -> str:
        """Return what is sent for one prompt text.

        Raises:
            PromptError: it is null, not text, or the template refuses it.
        """
        if text is None:
            raise PromptError("invalid_input", f"column {column!r} is null")
        if not isinstance(text, str):
            raise PromptError(
                "invalid_input", f"column {column!r} is a {type(text).__name__}, need text"
            )
        if not self.is_chat:
            return check_text(text)
        return self._apply([{"role": "user", "content": text}], None)

    def render_messages(
        self,
        messages: object,
        tools: object = None,
        *,
        column: str = "messages",
        tools_column: str = "tools",
    ) -> str:
        """Return what is sent for one conversation.

        Raises:
            PromptError: messages or tools are malformed, or the template refuses them.
        """
        if not self.is_chat:
            raise PromptError("invalid_input", "messages need a chat template, and it is none")
        return self._apply(
            to_messages(messages, column=column), to_tools(tools, column=tools_column)
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of rendered prompts, many at once."""
        if not texts:
            return []
        special = not self.is_chat
        if self._backend is None:
            return self._encode_slowly(texts, special)
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=special)
        token_ids = [encoding.ids for encoding in encoded]
        return [self._without_double_bos(ids) for ids in token_ids] if special else token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return what these tokens say to the model, special tokens spelt out."""
        if self._backend is None:
            return str(self._tokenizer.decode(list(token_ids)))
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))

    def encode_token(self, token: str) -> int | None:
        """Return the id of one token by its name; None when the tokenizer has no such token."""
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        return None if token_id is None else int(token_id)

    def finish(self, text: str, token_ids: list[int], *, max_tokens: int) -> Prompt:
        """Check the length, truncating if the job says so.

        Raises:
            PromptError: no tokens at all, or one that the model lacks (`invalid_input`), or too many
                (`overlong`).
        """
        num_tokens = len(token_ids)
        limit = self.config.max_model_len
        if num_tokens == 0:
            raise PromptError("invalid_input", "the prompt has no tokens")
        if self._num_known is not None and max(token_ids) >= self._num_known:
            raise PromptError("invalid_input", unknown_token(token_ids, self._num_known))
        is_thinking = text[-64:].rstrip().endswith(_THINK)
        if num_tokens < limit:
            return Prompt(token_ids, num_tokens, is_thinking, False)
        if self.config.on_overlong == "error":
            raise PromptError(
                "overlong",
                f"prompt length is {num_tokens} tokens, the limit is {limit} with the completion; "
                "shorten it, raise engine.max_model_len or set input.on_overlong",
            )
        kept = self._truncate(token_ids, max(1, limit - min(max_tokens, limit // 2)))
        return Prompt(kept, num_tokens, is_thinking and kept[-1] == token_ids[-1], True)

    def _truncate(self, token_ids: list[int], keep: int) -> list[int]:
        if self.config.on_overlong == "truncate_right":
            return token_ids[:keep]
        bos = self._tokenizer.bos_token_id
        if bos is not None and token_ids[0] == bos and keep > 1:
            return [bos, *token_ids[len(token_ids) - keep + 1 :]]
        return token_ids[len(token_ids) - keep :]

    def _without_double_bos(self, token_ids: list[int]) -> list[int]:
        bos = self._tokenizer.bos_token_id
        is_double = bos is not None and token_ids[:2] == [bos, bos]
        return token_ids[1:] if is_double else token_ids

    def _encode_slowly(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        encoded = self._tokenizer(list(texts), add_special_tokens=special)["input_ids"]
        return [self._without_double_bos(list(ids)) for ids in encoded]

    def _apply(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        kwargs = {"add_generation_prompt": True, **self.config.chat_template_kwargs}
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._template.override,
                tokenize=False,
                **kwargs,
            )
        except (InferenceError, RowLimit):
            raise
        except MemoryError:
            raise PromptError("invalid_input", "the chat template ran out of memory") from None
        except Exception as error:  # a template may raise anything; the row says which kind
            raise PromptError("invalid_input", self._template.describe(error)) from None
        return check_text(text)

    def _try_template(self) -> None:
        """Compile and render once, so that a broken template is refused before any row."""
        from jinja2.exceptions import TemplateSyntaxError

        kwargs = {"add_generation_prompt": True, **self.config.chat_template_kwargs}
        trial = [{"role": "user", "content": "x"}]
        try:
            self._tokenizer.apply_chat_template(
                trial, chat_template=self._template.override, tokenize=False, **kwargs
            )
        except TemplateSyntaxError as error:
            raise EngineConfigError(
                f"the chat template is wrong at line {error.lineno}: {error.message}"
            ) from None
        except MemoryError:
            raise EngineConfigError("the chat template needs too much memory") from None
        except RowLimit as error:
            raise EngineConfigError(f"the chat template is refused: {error}") from None
        except Exception:  # it may refuse this conversation and take the rows' own
            return


def unknown_token(token_ids: Sequence[int], num_known: int) -> str:
    """Say which token the model has no embedding for: it would break every sequence beside it."""
    wrong = next(token_id for token_id in token_ids if not 0 <= token_id < num_known)
    return f"token id {wrong} is not among the model's {num_known}"


def _num_known(model_dir: Path, tokenizer: Any) -> int | None:
    """Return how many tokens the model knows, where its tokenizer may give others; else None."""
    try:
        config = json.loads((model_dir / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    size = vocab_size_of(config)
    return size if size is not None and size < len(tokenizer) else None


def check_text(text: str) -> str:
    """Return the text, if it can be tokenised.

    Raises:
        PromptError: it is too long, or has half a surrogate pair.
    """
    if len(text) > MAX_RENDERED_CHARS:
        raise PromptError(
            "overlong", f"the prompt has {len(text)} characters, limit {MAX_RENDERED_CHARS}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            "invalid_input", f"the prompt has half a surrogate pair at character {error.start}"
        ) from None
    return text
