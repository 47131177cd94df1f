"""Ranks that die, and owners that die: nothing hangs, nothing is left behind, and the error says which rank."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import pytest

from inference.backends.paged import PagedBackend
from inference.backends.ranked import RankedBackend
from inference.config import DistributedConfig, EngineConfig
from inference.errors import EngineFault, OutOfMemory
from inference.sampling import SamplingParams
from inference.sequence import Completion, Sequence
from tests.processes import REPOSITORY, is_alive

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: tensor parallel needs it")

MODEL = str(REPOSITORY / "tests" / "data" / "models" / "tiny-a")
PATIENCE_S = 30.0


def config_of(size: int) -> EngineConfig:
    return EngineConfig(model=MODEL, backend="paged", dtype="float32", tensor_parallel_size=size)


def sequences(count: int, max_tokens: int = 12) -> list[Sequence]:
    samplings = [
        SamplingParams(max_tokens=max_tokens),
        SamplingParams(max_tokens=max_tokens, temperature=0.9, stop=("e",)),
        SamplingParams(max_tokens=max_tokens, temperature=1.0, top_k=9, logprobs=1),
    ]
    return [
        Sequence(i, list(range(3, 12 + i)), samplings[i % 3], draw_seed=2**63 + i)
        for i in range(count)
    ]


def drain(backend: Any) -> dict[int, Completion]:
    found = {}
    while backend.num_unfinished:
        found.update({c.seq_id: c for c in backend.step()})
    return found


def wait_until_gone(pids: list[int]) -> list[int]:
    """Wait for processes to end; return those that are left, having ended them."""
    deadline = time.monotonic() + PATIENCE_S
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def test_a_ranked_backend_serves_as_one_rank_does_and_a_killed_rank_ends_it():
    alone = PagedBackend(config_of(1))
    alone.submit(sequences(9))
    expected = drain(alone)
    backend = RankedBackend(config_of(2))
    try:
        pids = [backend.ranks.launcher_pid, *backend.ranks.pids.values()]
        assert len(set(pids)) == 3
        assert (backend.info.device, backend.info.num_ranks) == ("cpu", 2)
        backend.submit(sequences(9))
        assert backend.num_waiting == 9
        found = drain(backend)
        assert {i: (c.token_ids, c.text, c.finish_reason) for i, c in found.items()} == {
            i: (c.token_ids, c.text, c.finish_reason) for i, c in expected.items()
        }
        assert backend.num_waiting == 0
        assert backend.stats.num_completion_tokens == alone.stats.num_completion_tokens

        backend.submit(sequences(4, max_tokens=200))
        os.kill(backend.ranks.pids[1], signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(EngineFault) as fault:
            drain(backend)
        assert time.monotonic() - killed_at < PATIENCE_S
        assert re.match(r"rank 1 \(process \d+\): died without a word", str(fault.value))
        assert fault.value.retryable
    finally:
        backend.close()
    assert wait_until_gone(pids) == []


@pytest.mark.parametrize(
    ("launcher", "signum"), [("torchrun", signal.SIGKILL), ("deepspeed", signal.SIGTERM)]
)
def test_ranks_do_not_outlive_their_owner(launcher, signum):
    settings = replace(config_of(2), distributed=DistributedConfig(launcher=launcher))
    document = json.dumps(asdict(settings))
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.ranked_owner", document],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    try:
        pids = json.loads(owner.stdout.readline())
        assert [is_alive(pid) for pid in pids] == [True, True, True]
        owner.send_signal(signum)
        owner.wait(PATIENCE_S)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    assert wait_until_gone(pids) == []


def small_steps(limit: int) -> EngineConfig:
    return replace(config_of(2), max_num_seqs=8, max_num_batched_tokens=limit)


def test_ranks_of_which_one_is_out_of_memory_go_on_together_with_smaller_steps(monkeypatch, caplog):
    monkeypatch.setenv("NIGHTJAR_TEST_MOST_TOKENS", "40")
    alone = PagedBackend(config_of(1))
    alone.submit(sequences(12))
    expected = drain(alone)
    backend = RankedBackend(small_steps(64), module="tests.small_rank")
    try:
        before = backend.ranks.pids
        backend.submit(sequences(12))
        found = drain(backend)
        after = backend.ranks.pids
    finally:
        backend.close()
    assert {i: c.token_ids for i, c in found.items()} == {
        i: c.token_ids for i, c in expected.items()
    }
    assert set(before.values()).isdisjoint(after.values())
    assert "at most 32 tokens a step instead of 64" in caplog.text
    assert backend.stats.num_completion_tokens == alone.stats.num_completion_tokens


def test_ranks_of_which_one_is_out_of_memory_before_the_first_step_start_smaller(
    monkeypatch, caplog
):
    monkeypatch.setenv("NIGHTJAR_TEST_MOST_TOKENS", "40")
    monkeypatch.setenv("NIGHTJAR_TEST_WARM_UP", "1")
    backend = RankedBackend(small_steps(64), module="tests.small_rank")
    try:
        backend.submit(sequences(3))
        assert drain(backend).keys() == {0, 1, 2}
    finally:
        backend.close()
    assert "at most 32 tokens a step instead of 64" in caplog.text


def test_steps_that_cannot_be_smaller_end_the_replica_with_the_numbers(monkeypatch):
    monkeypatch.setenv("NIGHTJAR_TEST_MOST_TOKENS", "2")
    backend = RankedBackend(small_steps(8), module="tests.small_rank")
    try:
        backend.submit(sequences(3))
        with pytest.raises(OutOfMemory, match=r"smaller than engine\.max_num_seqs, 8; lower it"):
            drain(backend)
    finally:
        backend.close()
