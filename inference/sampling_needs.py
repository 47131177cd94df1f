"""SamplingNeeds: what the sampling of a whole run takes part in, known before its first step. No torch."""

from collections.abc import Collection, Iterable
from typing import NamedTuple, Self

from inference.sampling import SamplingParams

_FLOORS = frozenset({"top_k", "top_p", "min_p"})
_PENALTIES = frozenset({"repetition_penalty", "presence_penalty", "frequency_penalty"})


class SamplingNeeds(NamedTuple):
    """What sampling kernels are launched for: what any row so far has asked for, or is expected to."""

    draws: bool = False
    """A temperature."""

    floors: bool = False
    """top_k, top_p or min_p."""

    penalties: bool = False
    bans: bool = False
    """min_tokens."""

    logprobs: bool = False

    @classmethod
    def of(cls, sampling: SamplingParams, overridden: Collection[str] = ()) -> Self:
        """Return what a run needs whose rows may override these fields of its sampling, with any value."""
        fields = frozenset(overridden)
        return cls(
            draws=not sampling.is_greedy or "temperature" in fields,
            floors=has_floors(sampling) or not fields.isdisjoint(_FLOORS),
            penalties=has_penalty(sampling) or not fields.isdisjoint(_PENALTIES),
            bans=sampling.min_tokens > 0 or "min_tokens" in fields,
            logprobs=sampling.logprobs is not None,
        )

    @classmethod
    def of_all(cls, needs: "Iterable[SamplingNeeds]") -> Self:
        """Return what rows need that need these between them."""
        return cls(*map(any, zip(*needs, strict=True)))


GREEDY = SamplingNeeds()


def has_floors(sampling: SamplingParams) -> bool:
    """Whether some tokens are too unlikely to be drawn."""
    return bool(sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0)


def has_penalty(sampling: SamplingParams) -> bool:
    """Whether logits depend on which tokens came before."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )
