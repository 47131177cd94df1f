"""Sequence: a prompt and its completion so far. This module imports no torch."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from inference.sampling import SamplingParams

FinishReason = Literal["stop", "length", "error"]


class TokenLogprob(NamedTuple):
    """Log-probabilities at one completion position."""

    token_id: int
    logprob: float
    top: tuple[
        tuple[int, float], ...
    ]  # (token_id, logprob), most likely first; as many as asked for


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of one prompt, as the engine is given it."""

    seq_id: int
    """The caller's number, unique among the sequences a backend holds."""

    prompt_token_ids: Seq[int]
    """At least one token; everything the model is given."""

    sampling: SamplingParams = field(default_factory=SamplingParams)

    draw_seed: int = 0
    """64 bits; with the position it decides every random draw (see `inference.sampling.draw_seed`)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine adds to one sequence, prompt excluded."""

    seq_id: int
    token_ids: tuple[int, ...]
    """Sampled tokens, without the end token or stop token that ended them; with those of a stop string."""

    text: str
    """Decoded once, special tokens skipped, cut before a stop string; always valid UTF-8."""

    finish_reason: FinishReason

    error: str | None = None
    """Why, when finish_reason is `error`: one line, without prompt text."""

    logprobs: tuple[TokenLogprob, ...] | None = None

    num_cached_tokens: int = 0
    """Prompt tokens whose KV was reused from another sequence."""
