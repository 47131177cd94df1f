"""PagedEngine: the loop. Schedules a step, launches it, reads an earlier one's tokens, returns what finished.

The device is always a step or two ahead of the host: everything the host does here (taking tokens in, looking
for stop strings) happens while the device computes. Finished completions are decoded on another thread.

    schedule --> launch --> in flight (up to PIPELINE_DEPTH) --> take tokens --> finishing --> completions
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from inference.backends.base import EngineStats
from inference.backends.row import Row
from inference.errors import EngineFault, OutOfMemory
from inference.finishing import Finishing
from inference.in_flight import InFlight
from inference.memory import is_out_of_memory
from inference.model_runner import ModelRunner
from inference.sampler import SamplerRow
from inference.scheduler import Scheduler
from inference.sequence import Completion, Sequence, TokenLogprob
from inference.slot_params import STOPPED
from inference.steps import Running, Step
from inference.stop_strings import StopSlots

logger = logging.getLogger(__name__)

PIPELINE_DEPTH = 2
"""Steps launched before the first one's tokens are read; a sequence that ends wastes as many rows."""

NO_LOGITS = "the model gave no usable logits (NaN, infinite, or every token banned)"


@dataclass(slots=True, eq=False)
class _Lane:
    """A submitted sequence with its row, until its completion is returned."""

    row: Row
    is_watched: bool
    """Whether each token must be looked at: for logprobs to keep, or stop strings that any may end."""


class PagedEngine:
    """Drives one scheduler and one runner. Not thread-safe."""

    def __init__(
        self,
        *,
        make_row: Callable[[Sequence], Row],
        make_scheduler: Callable[[Callable[[Running], list[int]]], Scheduler],
        make_runner: Callable[[Callable[[Running], SamplerRow]], ModelRunner],
        is_async: bool,
    ) -> None:
        self._make_row = make_row
        self.scheduler = make_scheduler(self._completion_of)
        self.runner = make_runner(self._sampler_row)
        self._depth = PIPELINE_DEPTH if is_async else 0
        self._lanes: dict[int, _Lane] = {}
        self._in_flight: deque[InFlight] = deque()
        self._limbo: deque[tuple[int, Running]] = deque()
        self._finishing = Finishing(is_async=is_async)
        self._num_watched = 0
        num_slots = self.scheduler.max_num_seqs
        self._history: Any = np.zeros((num_slots, 512), np.int32)
        self._num_seen: Any = np.zeros(num_slots, np.int32)
        self._stops = StopSlots(num_slots)
        self._num_launched = 0
        self.stats = EngineStats(extra={"wait_s": 0.0})

    @property
    def num_unfinished(self) -> int:
        """Sequences submitted and not yet returned."""
        return len(self._lanes) + len(self._finishing)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits, though completions may still be decoded: the same on every rank."""
        return not self._lanes

    @property
    def seq_ids(self) -> Collection[int]:
        """Numbers of the unfinished sequences."""
        return self._lanes.keys() | set(self._finishing)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Take checked sequences."""
        sequences = list(sequences)
        for sequence in sequences:
            row = self._make_row(sequence)
            is_watched = (
                self._depth == 0
                or sequence.sampling.logprobs is not None
                or (bool(sequence.sampling.stop) and row.stop_watch is None)
            )
            self._lanes[sequence.seq_id] = _Lane(row, is_watched)
            self._num_watched += is_watched
        self.scheduler.add(sequences)

    def step(self) -> list[Completion]:
        """Launch a step if there is one, take in the oldest one's tokens if enough are ahead.

        Returns:
            Completions that are ready: of this step or, decoded behind the loop, of earlier ones.
        """
        started_at = time.perf_counter()
        if self.scheduler.is_short_of_blocks():
            self._drain()
        step = self.scheduler.schedule()
        if step is not None:
            self._launch(step)
        while self._in_flight and (step is None or len(self._in_flight) > self._depth):
            self._take(self._in_flight.popleft())
            if step is None:
                break
        is_idle = step is None and not self._in_flight
        completions = self._finishing.take(wait=is_idle)
        self._count_time(step, time.perf_counter() - started_at)
        return completions

    def _launch(self, step: Step) -> None:
        self._num_launched = step.number
        self._set_up(step.admitted)
        if self._in_flight and self.runner.needs_host(step):
            self._drain()
        try:
            self._in_flight.append(self.runner.launch(step))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise EngineFault(f"the device failed on step {step.number}: {error}") from error
            if self.runner.has_peers:
                raise self._full_among_peers() from error
            self._drain()
            self._shrink(step, error)
            return
        self._count(step)

    def _full_among_peers(self) -> OutOfMemory:
        """The error of a rank whose peers are in the middle of the same step and cannot take it back."""
        return OutOfMemory(
            f"out of memory in a step of at most {self.scheduler.max_num_batched_tokens} tokens; "
            f"lower engine.max_num_batched_tokens or engine.max_num_seqs, or use more ranks"
        )

    def _set_up(self, admitted: list[Running]) -> None:
        """Bring what the host keeps per slot in line with the sequences that start there."""
        for running in admitted:
            lane = self._lanes[running.sequence.seq_id]
            row = lane.row
            self._stops.set(running.slot, None if lane.is_watched else row.stop_watch)
            width = running.max_tokens + 8
            if width > self._history.shape[1]:
                wider = np.zeros((self._history.shape[0], max(width, 1024)), np.int32)
                wider[:, : self._history.shape[1]] = self._history
                self._history = wider
            self._history[running.slot, : running.num_sampled] = row.token_ids
            self._num_seen[running.slot] = running.num_sampled

    def _drain(self) -> None:
        while self._in_flight:
            self._take(self._in_flight.popleft())

    def _take(self, flight: InFlight) -> None:
        """Take in one step's tokens; append what they finish."""
        started_at = time.perf_counter()
        slots, step = flight.slots, flight.step
        try:
            tokens = flight.token_ids()
        except RuntimeError as error:  # of a kernel that failed behind its launch
            raise EngineFault(f"the device failed on step {step.number}: {error}") from error
        self.stats.extra["wait_s"] += time.perf_counter() - started_at
        sampled = step.sampled
        seen = self._num_seen[slots]
        self._history[slots, seen] = tokens & (STOPPED - 1)
        self._num_seen[slots] = seen + 1
        if flight.sampled is not None:
            self._take_slowly(flight)
        else:
            if self._num_watched:
                self._watch(flight, tokens)
            for index in self._stops.candidates(slots, tokens):
                self._look_for_stop(sampled[index])
            for index in np.flatnonzero((tokens < 0) | (tokens >= STOPPED)).tolist():
                self._end(sampled[index], int(tokens[index]))
        for running in step.finishing:
            if self._is_open(running):
                self._close(running, "length")
        while self._limbo and self._limbo[0][0] <= step.number:
            self.scheduler.release_slot(self._limbo.popleft()[1])

    def _take_slowly(self, flight: InFlight) -> None:
        """Take tokens the host has sampled: each through its row, which looks for every kind of end."""
        assert flight.sampled is not None
        for running, token_id, logprob in zip(
            flight.step.sampled, flight.sampled.token_ids, flight.sampled.logprobs, strict=True
        ):
            self._append(running, token_id, logprob)

    def _watch(self, flight: InFlight, tokens: Any) -> None:
        for index, running in enumerate(flight.step.sampled):
            lane = self._lanes.get(running.sequence.seq_id)
            if lane is None or not lane.is_watched or not 0 <= tokens[index] < STOPPED:
                continue
            token_id, num_top = int(tokens[index]), running.sequence.sampling.logprobs
            logprob = None if num_top is None else flight.logprob(index, token_id, num_top)
            self._append(running, token_id, logprob)

    def _look_for_stop(self, running: Running) -> None:
        """End a sequence whose last token completes a stop string."""
        if not self._is_open(running):
            return
        row, num_seen = self._lanes[running.sequence.seq_id].row, self._num_seen[running.slot]
        assert row.stop_watch is not None, "no token of such a row is a candidate"
        begin = max(0, num_seen - row.stop_watch.num_tail_tokens)
        if not row.stop_watch.is_near(self._history[running.slot, begin:num_seen].tolist()):
            return
        row.token_ids = self._history[running.slot, :num_seen].tolist()
        if row.is_stopped:
            row.finish_reason = "stop"
            self._return(running, row)

    def _append(
        self,
        running: Running,
        token_id: int,
        logprob: TokenLogprob | None,
    ) -> None:
        lane = self._lanes.get(running.sequence.seq_id)
        if lane is None or lane.row.sequence is not running.sequence:
            return  # ended in an earlier step; this token is the price of running ahead
        row = lane.row
        if not lane.is_watched:
            row.token_ids = self._history[running.slot, : self._num_seen[running.slot] - 1].tolist()
        if token_id < 0:
            row.fail(NO_LOGITS)
        if row.finish_reason is not None or row.append(token_id, logprob):
            self._return(running, row)

    def _end(self, running: Running, token: int) -> None:
        """End a sequence whose token the device has found to be its last, or no token."""
        self._num_seen[running.slot] -= 1  # an end token is not part of the completion
        if token < 0:
            self._close(running, "error")
        else:
            self._close(running, "stop")

    def _close(self, running: Running, reason: str) -> None:
        lane = self._lanes.get(running.sequence.seq_id)
        if lane is None or lane.row.sequence is not running.sequence:
            return
        row = lane.row
        if not lane.is_watched:
            row.token_ids = self._history[running.slot, : self._num_seen[running.slot]].tolist()
        if reason == "error":
            row.fail(NO_LOGITS)
        else:
            row.finish_reason = "stop" if reason == "stop" else "length"
        self._return(running, row)

    def _return(self, running: Running, row: Row) -> None:
        """Let a finished row go; its slot stays until no launched step uses it."""
        lane = self._lanes.pop(running.sequence.seq_id)
        self._num_watched -= lane.is_watched
        self.scheduler.finish(running, len(row.token_ids))
        has_ended = row.finish_reason != "length"
        self.scheduler.lengths.observe(len(row.token_ids), has_ended=has_ended)
        self._limbo.append((self._num_launched, running))
        self.stats.num_completion_tokens += len(row.token_ids)
        self._finishing.put(row, running.num_cached_tokens)

    def _completion_of(self, running: Running) -> list[int]:
        """Return what has been sampled since `running.token_ids` was set; the row keeps all of it."""
        row = self._lanes[running.sequence.seq_id].row
        row.token_ids = self._history[running.slot, : self._num_seen[running.slot]].tolist()
        return row.token_ids[running.num_sampled :]

    def _sampler_row(self, running: Running) -> SamplerRow:
        lane = self._lanes.get(running.sequence.seq_id)
        if lane is not None and lane.is_watched:
            token_ids = lane.row.token_ids
        else:
            token_ids = self._history[running.slot, : self._num_seen[running.slot]].tolist()
        sequence = running.sequence
        return SamplerRow(
            sampling=sequence.sampling,
            draw_seed=sequence.draw_seed,
            prompt_token_ids=sequence.prompt_token_ids,
            token_ids=token_ids,
            end_token_ids=() if lane is None else lane.row.end_token_ids,
        )

    def _shrink(self, step: Step, error: Exception) -> None:
        """After running out of memory: take everything back and go on with smaller steps."""
        scheduler, limit = self.scheduler, self.scheduler.max_num_batched_tokens
        scheduler.restart(step, has_ended=lambda running: not self._is_open(running))
        while self._limbo:  # nothing is launched any more
            scheduler.release_slot(self._limbo.popleft()[1])
        if not scheduler.shrink():
            raise OutOfMemory(
                "out of memory in steps of one sequence; lower engine.max_model_len, or use a larger device"
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory in step %d: going on with at most %d tokens a step instead of %d, of %d sequences",
            step.number,
            scheduler.max_num_batched_tokens,
            limit,
            scheduler.num_free_slots,
        )

    def _is_open(self, running: Running) -> bool:
        """Whether a sequence's completion has not been returned."""
        lane = self._lanes.get(running.sequence.seq_id)
        return lane is not None and lane.row.sequence is running.sequence

    def _count(self, step: Step) -> None:
        stats, blocks = self.stats, self.scheduler.blocks
        stats.num_steps += 1
        for running in step.admitted:
            if running.num_sampled == 0:
                stats.num_prompt_tokens += len(running.token_ids)
                stats.num_cached_tokens += running.num_cached_tokens
        stats.num_preemptions = self.scheduler.num_preemptions
        used = 1 - blocks.num_free_blocks / blocks.num_usable_blocks
        stats.kv_occupancy = max(stats.kv_occupancy, used)

    def _count_time(self, step: Step | None, elapsed_s: float) -> None:
        if step is not None and step.chunks:
            share = sum(chunk.num_tokens for chunk in step.chunks)
            share_s = elapsed_s * share / (share + len(step.decodes))
            self.stats.prefill_s += share_s
            elapsed_s -= share_s
        self.stats.decode_s += elapsed_s
