"""How fast an engine is on this machine: mixes of requests whose completions have forced lengths.

So the work depends on no weights and no stop token, and results of machines, settings and versions compare.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from inference.backends.base import Backend, BackendInfo
from inference.request_mixes import MIXES, Request, requests, run_to_ends
from inference.sampling import SamplingParams
from inference.sequence import Sequence
from storage.errors import BadInput

_FIRST_TOKEN_ID = 100
_WARM_REQUESTS, _WARM_TOKENS = 8, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MixResult:
    """One mix, run some times."""

    mix: str
    num_requests: int
    seconds: float
    """The median."""

    all_seconds: list[float]
    num_prompt_tokens: int
    num_completion_tokens: int
    num_steps: int
    """Of the last time."""

    @property
    def completion_tokens_per_s(self) -> float:
        """Completion tokens over the median."""
        return self.num_completion_tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Strict JSON values."""
        return {**asdict(self), "completion_tokens_per_s": round(self.completion_tokens_per_s, 1)}


def parse_mix(text: str) -> tuple[str, int]:
    """Return the mix and the number of requests of `chat:256`.

    Raises:
        BadInput: there is no such mix, or the number is none.
    """
    mix, _, number = text.partition(":")
    if mix not in MIXES or not number.isdigit() or int(number) < 1:
        raise BadInput(
            f"--mix is {text!r}; give MIX:REQUESTS, MIX one of {', '.join(MIXES)} and REQUESTS 1 or more"
        )
    return mix, int(number)


def bench(
    backend: Backend,
    mixes: list[tuple[str, int]],
    *,
    vocab_size: int,
    repeat: int = 1,
    on_result: Callable[[MixResult], None] = lambda result: None,
) -> list[MixResult]:
    """Run each mix `repeat` times on a built engine, after a few requests to warm it.

    Every time the lengths are the same and the prompts are others, so that no cache of prompts serves twice.

    Raises:
        InferenceError: the engine failed.
        ValueError: a completion had another length than was asked for.
    """
    numbers = count()
    warm = [(prompt, _WARM_TOKENS) for prompt, _ in requests("chat", _WARM_REQUESTS, seed=1)]
    _run(backend, _fitted(warm, backend.info, vocab_size, shift=1), numbers)
    results = []
    for mix, num_requests in mixes:
        times, steps = [], 0
        drawn = requests(mix, num_requests)
        for nth in range(repeat):
            before = backend.stats.num_steps
            fitted = _fitted(drawn, backend.info, vocab_size, shift=nth)
            times.append(_run(backend, fitted, numbers))
            steps = backend.stats.num_steps - before
        results.append(
            MixResult(
                mix=mix,
                num_requests=num_requests,
                seconds=statistics.median(times),
                all_seconds=[round(seconds, 3) for seconds in times],
                num_prompt_tokens=sum(len(prompt) for prompt, _ in fitted),
                num_completion_tokens=sum(length for _, length in fitted),
                num_steps=steps,
            )
        )
        on_result(results[-1])
    return results


def _fitted(
    drawn: list[Request], info: BackendInfo, vocab_size: int, *, shift: int
) -> list[Request]:
    """Bring requests into the model's vocabulary and length; another `shift`, other prompts."""
    num_ids = max(1, vocab_size - _FIRST_TOKEN_ID)
    first = min(_FIRST_TOKEN_ID, vocab_size - 1)
    fitted = []
    for prompt, length in drawn:
        length = min(length, max(1, info.max_model_len // 2))
        room = info.max_model_len - length
        ids = [first + (token + shift * 7919) % num_ids for token in prompt[:room]]
        fitted.append((ids, length))
    return fitted


def _run(backend: Backend, fitted: list[Request], numbers: Iterator[int]) -> float:
    """Run requests to their ends; return the seconds it took."""
    sequences = [
        Sequence(next(numbers), prompt, SamplingParams(max_tokens=length, ignore_eos=True))
        for prompt, length in fitted
    ]
    return run_to_ends(backend, sequences)
