"""The one protocol every backend speaks: a stream of sequences in, completions out as they finish.

Shards overlap because the caller may submit the next shard's sequences while this one's are running:

    backend.submit(sequences)              # any time, any number of times
    while backend.num_unfinished:
        for completion in backend.step():  # in the order they finish
            ...
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from inference.sequence import Completion, Sequence


@dataclass(slots=True)
class EngineStats:
    """Running totals since the backend was built; the receipt of a shard is a difference of two."""

    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    peak_device_bytes: int = 0
    kv_occupancy: float = 0.0
    """Highest share of KV blocks in use so far, 0 to 1."""

    extra: dict[str, float] = field(default_factory=dict)
    """Backend-specific counters, plain numbers only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendInfo:
    """What a built backend really is; recorded in the run's receipts."""

    backend: str
    """Its name: dummy, transformers, paged or zero."""

    device: str
    """Human-readable, for example `cpu` or `NVIDIA H100 80GB HBM3`."""

    dtype: str
    max_model_len: int
    max_num_seqs: int
    num_ranks: int = 1
    """Devices that hold the model between them."""

    load_s: float = 0.0
    compile_wait_s: float = 0.0
    """Of `load_s`: until kernels that were compiled beside the loading were there."""

    warmup_s: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes reserved on one device, by purpose."""


class Backend(Protocol):
    """One replica's engine. Not thread-safe: one caller drives it."""

    @property
    def info(self) -> BackendInfo:
        """What was built."""

    @property
    def stats(self) -> EngineStats:
        """Totals so far; the same object, updated in place."""

    @property
    def num_unfinished(self) -> int:
        """Sequences submitted and not yet returned."""

    @property
    def num_waiting(self) -> int:
        """Sequences submitted and not yet started; callers submit more when this runs low."""

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences; returns at once. The order given is a hint, never a promise.

        Raises:
            ValueError: a seq_id is already in use, or a prompt is empty or leaves no room for a token in max_model_len.
        """

    def step(self) -> list[Completion]:
        """Advance by one unit of work and return what finished (may be empty).

        Raises:
            InferenceError: nothing submitted can be finished by this backend any more.
        """

    def close(self) -> None:
        """Free the device; the backend is unusable afterwards. Safe to repeat."""
