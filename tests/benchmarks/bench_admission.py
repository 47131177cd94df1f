"""How many steps a request mix takes where KV blocks are scarce, and how often sequences are preempted. No device takes part.

    python tests/benchmarks/bench_admission.py --mix chat --requests 2048 --blocks 836 [--known]

The real scheduler, told of each step's tokens two steps late as the engine tells it. Completions end where the mix
has them end; the scheduler knows where only with `--known`, else that they may have `--limit` tokens. The share of the
cache that holds tokens is what admission is about: what is held back from sequences that end sooner is lost.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from inference.block_manager import BlockManager
from inference.graphs import around
from inference.request_mixes import requests
from inference.sampling import SamplingParams
from inference.scheduler import Scheduler
from inference.sequence import Sequence
from inference.steps import Running, Step

STEPS_LATE = 2


class Playback:
    """Runs a scheduler's steps without a model: completions end where they are said to."""

    def __init__(self, scheduler_of: functools.partial[Scheduler], ends: dict[int, int]) -> None:
        self.scheduler = scheduler_of(completion_of=self._completion_of)
        self.num_steps = 0
        self.num_prefilled = 0
        self.num_stored: list[int] = []
        """Tokens whose keys decoding rows have stored, by step."""

        self._ends = ends
        self._num_sampled = dict.fromkeys(ends, 0)
        self._finished: set[int] = set()
        self._in_flight: deque[Step] = deque()
        self._leaving: deque[tuple[int, Running]] = deque()

    def run(self, sequences: list[Sequence]) -> None:
        """Run sequences to their ends."""
        self.scheduler.add(sequences)
        while len(self._finished) < len(sequences):
            if self.scheduler.is_short_of_blocks():
                self._take(0)
            step = self.scheduler.schedule()
            if step is None:
                self._take(0)
                continue
            self.num_steps += 1
            self.num_prefilled += sum(chunk.num_tokens for chunk in step.chunks)
            stored = (len(r.token_ids) + step.number - r.joined_at + 1 for r in step.decodes)
            self.num_stored.append(sum(stored))
            self._in_flight.append(step)
            self._take(STEPS_LATE)

    def _completion_of(self, running: Running) -> list[int]:
        return [7] * (self._num_sampled[running.sequence.seq_id] - running.num_sampled)

    def _take(self, num_left: int) -> None:
        """Take in what steps sampled, but for the last ones."""
        while len(self._in_flight) > num_left:
            step = self._in_flight.popleft()
            for running in step.sampled:
                self._sample(running, is_last=running in step.finishing)
            while self._leaving and self._leaving[0][0] <= step.number:
                self.scheduler.release_slot(self._leaving.popleft()[1])

    def _sample(self, running: Running, *, is_last: bool) -> None:
        seq_id = running.sequence.seq_id
        if seq_id in self._finished:
            return  # the price of running ahead
        self._num_sampled[seq_id] += 1
        count = self._num_sampled[seq_id]
        if is_last or count == self._ends[seq_id]:
            self._finished.add(seq_id)
            self.scheduler.finish(running, count)
            self.scheduler.lengths.observe(count, has_ended=not is_last)
            self._leaving.append((self.num_steps, running))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mix", default="chat")
    parser.add_argument("--requests", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=836, help="of 64 tokens, one of them trash")
    parser.add_argument("--limit", type=int, default=1024, help="max_tokens of every request")
    parser.add_argument("--known", action="store_true", help="ends are known in advance")
    args = parser.parse_args()
    mix = requests(args.mix, args.requests)
    playback = Playback(
        functools.partial(
            Scheduler,
            BlockManager(num_blocks=args.blocks, block_size=64),
            max_num_seqs=1024,
            max_num_batched_tokens=8192,
            max_model_len=4096,
            min_step_tokens=256,
            sizes_around=functools.partial(around, limit=8192),
        ),
        {i: min(length, args.limit) for i, (_, length) in enumerate(mix)},
    )
    sequences = [
        Sequence(
            i,
            prompt,
            SamplingParams(max_tokens=length if args.known else args.limit, ignore_eos=args.known),
        )
        for i, (prompt, length) in enumerate(mix)
    ]
    started_at = time.perf_counter()
    playback.run(sequences)
    elapsed_s = time.perf_counter() - started_at
    found = {
        "steps": playback.num_steps,
        "preempted": playback.scheduler.num_preemptions,
        "prompt_tokens": sum(len(prompt) for prompt, _ in mix),
        "prefilled_tokens": playback.num_prefilled,
        "share_of_cache": round(statistics.fmean(playback.num_stored) / (args.blocks * 64), 3),
        "ms_a_step": round(1e3 * elapsed_s / playback.num_steps, 3),
    }
    for name, value in found.items():
        print(f"{name:18} {value}")
    print(json.dumps({"benchmark": "admission", **vars(args), **found}))


if __name__ == "__main__":
    main()
