"""One request of an OpenAI batch file: what its `body` asks for, in Nightjar's terms."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inference.errors import PromptError
from inference.sampling import SamplingParams

_SAMPLING = {
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "min_tokens": "min_tokens",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "seed": "seed",
    "ignore_eos": "ignore_eos",
}
SAMPLING_FIELDS = frozenset(_SAMPLING.values())
"""What a body may set of `SamplingParams`."""

# Bookkeeping of the service the file was written for; none of it can change a completion here.
_IGNORED = frozenset({"model", "user", "metadata", "store", "service_tier", "stream_options"})
# Asking for what happens anyway is no fault.
_HARMLESS = {"stream": False, "logprobs": False, "tool_choice": "auto", "top_logprobs": 0}
_URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What one line asks for; exactly one of messages and prompt is given."""

    messages: object = None
    prompt: str | None = None
    tools: object = None
    overrides: dict[str, Any] = field(default_factory=dict)


def read_request(url: object, body: object, run: SamplingParams) -> BatchRequest:
    """Take one line's url and body apart.

    Raises:
        PromptError: another endpoint, no prompt, or a parameter that cannot be honoured.
    """
    if not isinstance(body, dict):
        raise PromptError("invalid_input", "body is not an object")
    kind = "messages" if url is None and "messages" in body else _URLS.get(str(url or ""))
    if url is None and kind is None and "prompt" in body:
        kind = "prompt"
    if kind is None:
        raise PromptError("invalid_input", f"url must be one of {', '.join(sorted(_URLS))}")
    overrides = _overrides(body, kind, run)
    if kind == "messages":
        return BatchRequest(
            messages=body.get("messages"), tools=body.get("tools"), overrides=overrides
        )
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise PromptError("invalid_input", "body.prompt must be one string")
    return BatchRequest(prompt=prompt, overrides=overrides)


def _overrides(body: Mapping[str, Any], kind: str, run: SamplingParams) -> dict[str, Any]:
    """Return sampling overrides by Nightjar's names; `max_completion_tokens` is `max_tokens`."""
    own = {kind, "tools"} if kind == "messages" else {kind}
    overrides: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in own or name in _IGNORED:
            continue
        if name in _SAMPLING:
            field_name = _SAMPLING[name]
            if overrides.get(field_name, value) != value:
                raise PromptError(
                    "invalid_input", "body.max_tokens and body.max_completion_tokens differ"
                )
            overrides[field_name] = value
        elif not _is_harmless(name, value, run):
            raise PromptError("invalid_input", f"body.{name[:40]} cannot be honoured; remove it")
    return overrides


def _is_harmless(name: str, value: object, run: SamplingParams) -> bool:
    if name == "n":
        return value == run.n
    if name in ("logprobs", "top_logprobs") and run.logprobs is not None:
        return True
    return name in _HARMLESS and _HARMLESS[name] == value
