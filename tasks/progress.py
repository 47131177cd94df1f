"""What a run has done so far, as plain counters that any thread may read."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Counters at one moment."""

    phase: str
    num_rows: int
    rows_done: int
    states: dict[str, int]
    num_shards: int
    shards: dict[str, int]
    num_completion_tokens: int
    elapsed_s: float
    tokens_per_s: float
    """Completion tokens per second, over about the last half minute of generation."""

    eta_s: float | None
    finish_p50: str | None = None
    """Of the whole run with all its replicas, as last read from the store."""

    finish_p90: str | None = None
    deadline: str | None = None


@dataclass(slots=True)
class Progress:
    """Counts rows, tokens and shard states of this process; `snapshot` is safe from any thread."""

    phase: str = "starting"
    num_rows: int = 0
    num_shards: int = 0
    notes: list[str] = field(default_factory=list)
    finish_p50: str | None = None
    finish_p90: str | None = None
    deadline: str | None = None
    _states: Counter[str] = field(default_factory=Counter)
    _shards: Counter[str] = field(default_factory=Counter)
    _tokens: int = 0
    _started_at: float = field(default_factory=time.monotonic)
    _rows_at_start: int = 0
    _generating_since: float | None = None
    _recent: list[tuple[float, int]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def expect(self, *, num_rows: int, num_shards: int) -> None:
        """Say how much there is in all, and start counting what is done anew."""
        with self._lock:
            self.num_rows, self.num_shards = num_rows, num_shards
            self._states.clear()
            self._shards.clear()
            self._rows_at_start = 0

    def planned(self, rows_done: int, num_rows: int) -> None:
        """Say how far planning has come."""
        self.phase = f"planning, {rows_done:,} of {num_rows:,} rows"

    def staged(self, num_bytes: int, total_bytes: int) -> None:
        """Say how far staging has come."""
        self.phase = f"staging the model, {num_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB"

    def note(self, text: str) -> None:
        """Tell the user one line; shown once by whoever renders progress."""
        with self._lock:
            self.notes.append(text)

    def take_notes(self) -> list[str]:
        """Return lines not yet shown."""
        with self._lock:
            notes, self.notes = self.notes, []
            return notes

    def already_done(self, states: Counter[str]) -> None:
        """Count a shard that was committed before this process came."""
        with self._lock:
            self._states.update(states)
            self._rows_at_start += sum(states.values())
            self._shards["committed"] += 1

    def row_done(self, state: str, num_completion_tokens: int) -> None:
        """Count one output row."""
        now = time.monotonic()
        with self._lock:
            if self._generating_since is None:
                self._generating_since = now
            self._states[state] += 1
            self._tokens += num_completion_tokens
            if not self._recent or now - self._recent[-1][0] > 0.5:
                self._recent.append((now, self._tokens))
                while now - self._recent[0][0] > 30:
                    self._recent.pop(0)

    def rows_undone(self, states: Counter[str]) -> None:
        """Take back the rows of an attempt that failed."""
        with self._lock:
            self._states.subtract(states)

    def shard(self, change: str, *, was: str | None = None) -> None:
        """Move one shard to a state: running, committed, failed."""
        with self._lock:
            self._shards[change] += 1
            if was:
                self._shards[was] -= 1

    def snapshot(self) -> Snapshot:
        """Return the counters now."""
        now = time.monotonic()
        with self._lock:
            done = sum(self._states.values())
            since = self._generating_since
            fresh = done - self._rows_at_start
            eta = None
            if since is not None and fresh > 0 and now > since:
                eta = (self.num_rows - done) * (now - since) / fresh
            rate = 0.0
            if self._recent and now > self._recent[0][0]:
                rate = (self._tokens - self._recent[0][1]) / (now - self._recent[0][0])
            return Snapshot(
                phase=self.phase,
                num_rows=self.num_rows,
                rows_done=done,
                states={k: v for k, v in self._states.items() if v},
                num_shards=self.num_shards,
                shards={k: v for k, v in self._shards.items() if v},
                num_completion_tokens=self._tokens,
                elapsed_s=now - self._started_at,
                tokens_per_s=rate,
                eta_s=eta,
                finish_p50=self.finish_p50,
                finish_p90=self.finish_p90,
                deadline=self.deadline,
            )
