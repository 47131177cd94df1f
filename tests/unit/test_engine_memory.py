"""Running out of memory while tokens of earlier steps are still on their way."""

import dataclasses

import pytest
import torch

from inference.errors import EngineFault
from inference.in_flight import InFlight
from inference.sampling import SamplingParams
from inference.sequence import Sequence
from inference.slot_params import STOPPED
from inference.steps import Step
from tests.benchmarks.bench_host import HostRunner, make_engine


class StoppingRunner(HostRunner):
    """Every sequence draws its end token in one step, and another cannot be launched."""

    stops_at, fails_at = 0, 0

    def launch(self, step: Step) -> InFlight:
        if step.number == self.fails_at:
            self.fails_at = 0
            raise torch.OutOfMemoryError("no memory left")
        flight = super().launch(step)
        if step.number != self.stops_at:
            return flight
        return dataclasses.replace(flight, result=self._result | STOPPED)


class FaultyEvent:
    """Of a kernel that failed after it was launched."""

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def completions_of(
    num_rows: int, max_tokens: int, *, stops_at: int, fails_at: int, max_num_seqs: int
) -> dict[int, int]:
    engine = make_engine(max_num_seqs, StoppingRunner)
    engine.runner.stops_at, engine.runner.fails_at = stops_at, fails_at  # type: ignore[attr-defined]
    sampling = SamplingParams(max_tokens=max_tokens)
    engine.submit(Sequence(i, [i, 2, 3], sampling, draw_seed=i) for i in range(num_rows))
    found: dict[int, int] = {}
    for _ in range(100):
        found.update({c.seq_id: len(c.token_ids) for c in engine.step()})
        if not engine.num_unfinished:
            return found
    raise AssertionError(f"{engine.num_unfinished} sequences never end")


@pytest.mark.parametrize("stops_at", range(1, 8))
@pytest.mark.parametrize("fails_at", range(1, 8))
@pytest.mark.parametrize("max_num_seqs", [1, 2, 4])
def test_sequences_that_end_while_a_step_cannot_be_launched_end_once(
    stops_at: int, fails_at: int, max_num_seqs: int
) -> None:
    found = completions_of(3, 5, stops_at=stops_at, fails_at=fails_at, max_num_seqs=max_num_seqs)
    assert found.keys() == {0, 1, 2}
    assert all(0 <= length <= 5 for length in found.values())


def test_a_kernel_that_fails_behind_its_launch_is_a_fault_of_the_device() -> None:
    engine = make_engine(2)
    launch = engine.runner.launch
    engine.runner.launch = lambda step: dataclasses.replace(launch(step), event=FaultyEvent())  # type: ignore[method-assign]
    engine.submit([Sequence(0, [1, 2, 3], SamplingParams(max_tokens=4), draw_seed=0)])
    engine.step(), engine.step()
    with pytest.raises(EngineFault, match="illegal memory access"):
        engine.step()
