"""Metering: where a replica's time goes, between one shard's end and the next one's."""

import time
from dataclasses import dataclass, field

from inference.backends.base import Backend, EngineStats


@dataclass(slots=True)
class Meter:
    """Where a replica's time has gone so far, in seconds, beside what the engine counts itself."""

    stage_s: float = 0.0
    load_s: float = 0.0
    warmup_s: float = 0.0
    start_s: float = 0.0
    canary_s: float = 0.0
    read_s: float = 0.0
    tokenise_s: float = 0.0
    step_s: float = 0.0
    """Inside `Backend.step`."""

    tail_s: float = 0.0
    """Of `step_s`."""

    tail_tokens: int = 0
    """Completion tokens that were added meanwhile."""

    write_s: float = 0.0

    @property
    def started_s(self) -> float:
        """What is spent before the first shard is claimed."""
        return self.stage_s + self.load_s + self.warmup_s + self.canary_s

    def starved(self, seconds: float, tokenise_share: float) -> None:
        """The engine waited so long for rows; the feed says how much of it was tokenising."""
        if not self.step_s:
            self.start_s += seconds
            return
        self.tokenise_s += seconds * tokenise_share
        self.read_s += seconds * (1 - tokenise_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """All totals at one moment; a receipt covers what lies between two."""

    at: float
    """Monotonic seconds."""

    meter: Meter = field(default_factory=Meter)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_steps: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0

    @classmethod
    def take(cls, stats: EngineStats, meter: Meter, *, at: float) -> "Mark":
        """Copy the running totals."""
        return cls(
            at=at,
            meter=Meter(**{name: getattr(meter, name) for name in Meter.__slots__}),
            prefill_s=stats.prefill_s,
            decode_s=stats.decode_s,
            num_steps=stats.num_steps,
            num_preemptions=stats.num_preemptions,
            num_cached_tokens=stats.num_cached_tokens,
            num_prompt_tokens=stats.num_prompt_tokens,
        )


class Metering:
    """Times one replica. Its own thread drives it."""

    def __init__(self, spent: Meter) -> None:
        """`spent`: what an engine that is taken over has cost so far, to be counted in the first receipt."""
        self.meter = spent
        self._mark: Mark | None = None

    def begin(self, stage_s: float) -> None:
        """Count from now on; what staging and a canary took before is the first shard's. Once."""
        if self._mark is None:
            self.meter.stage_s += stage_s
            self._mark = Mark(at=time.monotonic() - self.meter.started_s)

    def waited_for_claim(self, seconds: float) -> None:
        """Nothing was in hand; only before the first step is it the start."""
        if not self.meter.step_s:
            self.meter.start_s += seconds

    def built(self, backend: Backend, elapsed_s: float, *, staging_s: float) -> None:
        """An engine was built, or taken over, and waited so long for weights on their way."""
        # An engine that was warm already took no time, and has counted before.
        warmup_s = min(backend.info.warmup_s, elapsed_s)
        staging_s = min(staging_s, elapsed_s - warmup_s)
        self.meter.warmup_s += warmup_s
        self.meter.stage_s += staging_s
        self.meter.load_s += elapsed_s - warmup_s - staging_s
        if self._mark is not None:
            self._mark = Mark.take(backend.stats, self._mark.meter, at=self._mark.at)

    def stepped(self, seconds: float, *, tail_s: float, tail_tokens: int) -> None:
        """The engine made a step; what of it was the tail."""
        self.meter.step_s += seconds
        self.meter.tail_s += tail_s
        self.meter.tail_tokens += tail_tokens

    def wrote(self, seconds: float) -> None:
        """The engine had nothing to do but to wait for results to be written."""
        self.meter.write_s += seconds

    def cut(self, backend: Backend | None) -> tuple[Mark, Mark]:
        """End a shard's part here; return its two ends.

        Raises:
            RuntimeError: nothing has begun.
        """
        if self._mark is None:
            raise RuntimeError("cut before begin: no shard was claimed")
        before, self._mark = self._mark, self.take(backend)
        return before, self._mark

    def take(self, backend: Backend | None) -> Mark:
        """Return all totals as they are now."""
        stats = backend.stats if backend is not None else EngineStats()
        return Mark.take(stats, self.meter, at=time.monotonic())

    def restart(self) -> None:
        """The engine is gone with its totals: what follows counts from zero and from now."""
        self._mark = self.take(None)
