"""Host time of the paged engine's loop, a step: scheduling, packing, taking tokens in. No device takes part.

    python tests/benchmarks/bench_host.py [--requests 4096] [--max-num-seqs 1024] [--stop TEXT ...]

The real engine, scheduler and planner run a request mix with the limits of an H100; what would launch a step
hands back arbitrary tokens at once. With --stop rows have these stop strings, and tokens are those of a text, by the
tokenizer of --model. So this is what the host costs beside the device, which it overlaps with.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from inference.backends.row import Row, RowMaker
from inference.batch import BatchLimits, buffer_size, views_of
from inference.block_manager import BlockManager
from inference.engine import PagedEngine
from inference.graphs import around, padded
from inference.in_flight import InFlight
from inference.loading import load_tokenizer
from inference.planner import Planner, Slots
from inference.request_mixes import requests
from inference.sampling import SamplingParams
from inference.scheduler import Scheduler
from inference.sequence import Sequence
from inference.slot_params import SlotParams
from inference.steps import Running, Step
from inference.weights import check_small_files


class _Done:
    """The event of a step that is over."""

    def synchronize(self) -> None:
        return None


class HostRunner:
    """All of the runner's host work and none of the device's."""

    has_peers = False

    def __init__(self, limits: BatchLimits, row_of: Any) -> None:
        self._limits, self._row_of = limits, row_of
        rows = limits.max_num_seqs
        self._slots = Slots(limits, np.zeros((rows, limits.max_blocks_per_seq), np.int32))
        self._planner = Planner(limits, self._slots)
        self._params = SlotParams(rows, torch.device("cpu"))
        self._parts = views_of(np.zeros(buffer_size(limits), np.int32), limits)
        self._result = torch.full((rows,), 7, dtype=torch.int32)

    def launch(self, step: Step) -> InFlight:
        for running in step.admitted:
            self._slots.start(running.slot, running.num_cached_tokens, running.num_sampled)
            self._params.write(running.slot, self._row_of(running))
        self._slots.write_block_tables(step)
        plan = self._planner.fill(step, self._parts)
        limits = self._limits
        self._planner.pad(
            self._parts,
            plan,
            padded(plan.num_tokens, limits.max_num_tokens),
            padded(plan.num_samples, limits.max_num_seqs),
        )
        slots = self._parts["sample_slot"][: plan.num_samples].copy()
        return InFlight(step, slots, self._result, _Done(), None)

    def needs_host(self, step: Step) -> bool:
        return False


class TextRunner(HostRunner):
    """Hands back the tokens of a text, every row from another place on."""

    text_ids: Any = np.zeros(1, np.int32)

    def launch(self, step: Step) -> InFlight:
        flight = super().launch(step)
        begin = 37 * step.number % (len(self.text_ids) - len(self._result))
        found = self.text_ids[begin : begin + len(self._result)].copy()
        return dataclasses.replace(flight, result=torch.from_numpy(found))


def make_engine(max_num_seqs: int, runner: type[HostRunner] = HostRunner) -> PagedEngine:
    limits = BatchLimits(
        max_num_tokens=8192,
        max_num_seqs=max_num_seqs,
        max_num_items=4 * max_num_seqs,
        block_size=64,
        max_blocks_per_seq=64,
        tile_queries=16,
        num_programs=33,
    )
    blocks = BlockManager(num_blocks=8000, block_size=64)

    def make_row(sequence: Sequence) -> Row:
        return Row(sequence, lambda token_ids: "", (), (), sequence.sampling.max_tokens)

    def make_scheduler(completion_of: Callable[[Running], list[int]]) -> Scheduler:
        return Scheduler(
            blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=8192,
            max_model_len=4096,
            min_step_tokens=256,
            completion_of=completion_of,
            sizes_around=functools.partial(around, limit=8192),
        )

    return PagedEngine(
        make_row=make_row,
        make_scheduler=make_scheduler,
        make_runner=lambda row_of: runner(limits, row_of),
        is_async=True,
    )


def engine_on_text(max_num_seqs: int, model: Path) -> PagedEngine:
    """Return an engine whose rows draw this checkout's documents, decoded by a model's tokenizer."""
    tokenizer = load_tokenizer(check_small_files(model))
    root = Path(__file__).resolve().parents[2]
    text = "".join(path.read_text() for path in sorted(root.rglob("*.md")))
    TextRunner.text_ids = np.array(tokenizer.encode(text, verbose=False), np.int32)
    engine = make_engine(max_num_seqs, TextRunner)
    engine._make_row = RowMaker(tokenizer, (), 4096)
    return engine


def measure(
    mix: str, count: int, max_num_seqs: int, temperature: float, stop: list[str], model: Path
) -> dict[str, Any]:
    """Run a mix; return milliseconds a step, over all steps and over those with a full batch."""
    engine = engine_on_text(max_num_seqs, model) if stop else make_engine(max_num_seqs)
    engine.submit(
        Sequence(
            i,
            prompt,
            SamplingParams(max_tokens=length, ignore_eos=True, temperature=temperature, stop=stop),
            draw_seed=i,
        )
        for i, (prompt, length) in enumerate(requests(mix, count))
    )
    steps: list[tuple[float, int]] = []
    while engine.num_unfinished:
        num_running = engine.scheduler.num_running
        started_at = time.perf_counter()
        engine.step()
        steps.append((1e3 * (time.perf_counter() - started_at), num_running))
    full = [ms for ms, running in steps if running >= 0.95 * max_num_seqs]
    return {
        "num_steps": len(steps),
        "mean_ms": round(statistics.fmean(ms for ms, _ in steps), 3),
        "num_full_steps": len(full),
        "full_median_ms": round(statistics.median(full), 3) if full else None,
        "full_mean_ms": round(statistics.fmean(full), 3) if full else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--stop", nargs="*", default=[])
    parser.add_argument("--model", type=Path, default=Path(".demo/smollm2"))
    args = parser.parse_args()
    results = {}
    for mix in ("uniform", "chat", "template"):
        results[mix] = measure(
            mix, args.requests, args.max_num_seqs, args.temperature, args.stop, args.model
        )
        print(f"{mix:9}", results[mix], flush=True)
    print(json.dumps({"benchmark": "host", **vars(args), **results}, default=str))


if __name__ == "__main__":
    main()
