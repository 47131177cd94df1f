"""ReplicaEngine: a replica's engine, built when the first rows come, and whose each of its sequences is."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from inference.backends.base import Backend
from inference.sequence import Completion, Sequence
from tasks.latency import Latencies
from tasks.metering import Metering
from tasks.metrics import EngineReading
from tasks.progress import Progress
from tasks.results import SampleKey
from tasks.unforeseen import engine_faults


class Finished(NamedTuple):
    """One completion and the output row it belongs to."""

    shard_id: int
    key: SampleKey
    completion: Completion


class _Owner(NamedTuple):
    shard_id: int
    key: SampleKey
    submitted_at: float


@dataclass(slots=True, kw_only=True)
class ReplicaEngine:
    """One engine at a time; after one is dropped the next sequences have another built. One thread drives it."""

    build: Callable[[], Backend]
    take_waited_s: Callable[[], float]
    """Seconds that the engine built last has waited for weights to be staged."""

    metering: Metering
    progress: Progress
    latencies: Latencies = field(default_factory=Latencies)
    backend: Backend | None = None
    _owners: dict[int, _Owner] = field(default_factory=dict)
    _next_seq_id: int = 0

    @property
    def num_unfinished(self) -> int:
        """Sequences in the engine."""
        return self.backend.num_unfinished if self.backend is not None else 0

    @property
    def has_room(self) -> bool:
        """Whether another shard's rows would not only queue."""
        if self.backend is None or not self.backend.num_unfinished:
            return True
        return self.backend.num_waiting <= self.backend.info.max_num_seqs

    @property
    def shard_ids(self) -> set[int]:
        """Shards that have sequences in the engine."""
        return {owner.shard_id for owner in self._owners.values()}

    def register(self, shard_id: int, key: SampleKey) -> int:
        """Return the number of a new sequence, which is this output row's."""
        seq_id = self._next_seq_id
        self._next_seq_id += 1
        self._owners[seq_id] = _Owner(shard_id, key, time.monotonic())
        return seq_id

    def submit(self, sequences: list[Sequence]) -> None:
        """Hand registered sequences over. Raises InferenceError when no engine can be built."""
        with engine_faults():
            self._built().submit(sequences)

    def step(self, *, may_grow: bool) -> list[Finished]:
        """Make one step; `may_grow`: rows that are being read may follow.

        Raises:
            InferenceError: the engine broke.
        """
        with engine_faults():
            backend = self._built()
        # Nothing waits and nothing follows: from here on the batch only shrinks.
        is_tail = (
            not may_grow
            and not backend.num_waiting
            and backend.num_unfinished < backend.info.max_num_seqs
        )
        started, decoded_s = time.monotonic(), backend.stats.decode_s
        num_running, num_steps = backend.num_unfinished, backend.stats.num_steps
        with engine_faults():
            completions = backend.step()
        stepped = time.monotonic()
        tail_s = backend.stats.decode_s - decoded_s if is_tail else 0.0
        tail_tokens = num_running * (backend.stats.num_steps - num_steps) if tail_s > 0 else 0
        self.metering.stepped(stepped - started, tail_s=tail_s, tail_tokens=tail_tokens)
        return [self._finished(completion, stepped) for completion in completions]

    def drop(self) -> None:
        """Forget the engine and all its sequences: it broke."""
        self._owners.clear()
        self.close()
        self.metering.restart()

    def close(self) -> None:
        """Release the engine. Safe to repeat."""
        backend, self.backend = self.backend, None
        if backend is not None:
            backend.close()

    def reading(self, *, num_failed_attempts: int) -> EngineReading:
        """Return what the engine is doing now; any thread may ask."""
        backend = self.backend
        if backend is None:
            return EngineReading(num_failed_attempts=num_failed_attempts)
        waiting, stats = backend.num_waiting, backend.stats
        return EngineReading(
            num_running=max(0, backend.num_unfinished - waiting),
            num_waiting=waiting,
            kv_occupancy=stats.kv_occupancy,
            num_prompt_tokens=stats.num_prompt_tokens,
            num_cached_tokens=stats.num_cached_tokens,
            num_completion_tokens=stats.num_completion_tokens,
            num_preemptions=stats.num_preemptions,
            num_failed_attempts=num_failed_attempts,
        )

    def _built(self) -> Backend:
        if self.backend is None:
            self.progress.phase = "loading the model"
            started = time.monotonic()
            self.backend = self.build()
            self.metering.built(
                self.backend, time.monotonic() - started, staging_s=self.take_waited_s()
            )
            self.progress.phase = "generating"
        return self.backend

    def _finished(self, completion: Completion, now: float) -> Finished:
        owner = self._owners.pop(completion.seq_id)
        self.latencies.add(now - owner.submitted_at)
        return Finished(owner.shard_id, owner.key, completion)
