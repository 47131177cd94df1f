"""SamplingParams: how the next token is chosen, per sequence. This module imports no torch."""

import hashlib
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

# Limits a per-row column is checked against; a value outside them makes that row `invalid_input`.
MAX_LOGPROBS = 20
MAX_COUNT = 2**31 - 1
"""Counts and token ids are int32 on the device; a larger one would break every row beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a caller may ask for one prompt. Names and meanings are vLLM's.

    A lone stop string, and lists, are taken for tuples. Raises ValueError, which names the field.
    """

    max_tokens: int = 512
    """Most completion tokens."""

    min_tokens: int = 0
    """No end token or stop string is honoured before this many completion tokens."""

    temperature: float = 0.0
    """0 is greedy and exact."""

    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""

    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""

    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""

    repetition_penalty: float = 1.0
    """Divide positive, multiply negative logits of tokens seen in prompt or completion."""

    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already in the completion."""

    frequency_penalty: float = 0.0
    """Subtracted per occurrence from the logit of each token already in the completion."""

    stop: tuple[str, ...] = ()
    """Strings that end the completion; the text is cut before the first of them."""

    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, besides the model's own; not part of the text."""

    ignore_eos: bool = False
    """Go on past the model's end tokens (benchmarks)."""

    seed: int = 0
    """Every draw derives from this, the row and the sample."""

    n: int = 1
    """Completions per prompt."""

    logprobs: int | None = None
    """Log-probabilities to return per token: the chosen one's and this many most likely; None for none."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _tuple_of(str, "stop", stop))
        token_ids = _tuple_of(Integral, "stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", token_ids)
        self._check_kinds()
        checks = (
            ("max_tokens", 1 <= self.max_tokens <= MAX_COUNT, f"between 1 and {MAX_COUNT}"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", 0 <= self.top_k <= MAX_COUNT, f"0 (all) or a count up to {MAX_COUNT}"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0, at most 100"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("stop", all(self.stop), "without empty strings"),
            (
                "stop_token_ids",
                all(0 <= token_id <= MAX_COUNT for token_id in self.stop_token_ids),
                f"token ids between 0 and {MAX_COUNT}",
            ),
            ("n", 1 <= self.n <= 1024, "between 1 and 1024"),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"between 0 and {MAX_LOGPROBS}",
            ),
        )
        for name, is_right, rule in checks:
            if not is_right:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    def _check_kinds(self) -> None:
        for names, kind, rule in _KINDS:
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise ValueError(f"{name} must be {rule}, got {value!r}")
        if self.logprobs is not None and type(self.logprobs) is not int:
            raise ValueError(f"logprobs must be a whole number or None, got {self.logprobs!r}")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


_KINDS: tuple[tuple[tuple[str, ...], type, str], ...] = (
    (("max_tokens", "min_tokens", "top_k", "seed", "n"), Integral, "a whole number"),
    (
        (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ),
        Real,
        "a number",
    ),
)


def _tuple_of(kind: type, name: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, (tuple, list)) or not all(isinstance(v, kind) for v in values):
        wanted = "a string or a list of strings" if kind is str else "a list of token ids"
        raise ValueError(f"{name} must be {wanted}, got {values!r}")
    return tuple(values)


def draw_seed(seed: int, row_key: int | str, sample_index: int) -> int:
    """Return the 64-bit seed of one sample of one row; batch order and retries cannot change it."""
    text = f"{seed}\0{row_key}\0{sample_index}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
