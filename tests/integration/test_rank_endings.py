"""How ranks end together, over several hosts, and when those of a further host start again."""

import logging
import re
import socket
import threading
import time

import pytest

from inference import launch
from inference.config import DistributedConfig
from inference.launch import Launch, RankProcesses, wait_until_gone
from inference.rank_exit import ExitCode
from inference.rank_group import RankGroup
from tasks import follow
from tests.ports import free_port

FULL, BROKEN, FINISHED = ExitCode.OUT_OF_MEMORY, ExitCode.ENGINE_FAULT, ExitCode.FINISHED


@pytest.fixture
def starts(tmp_path, monkeypatch):
    path = tmp_path / "starts"
    monkeypatch.setenv("NIGHTJAR_TEST_STARTS", str(path))
    return path


def endings_of_two(code: ExitCode, caplog: pytest.LogCaptureFixture) -> tuple[int, list[str]]:
    """Run two ranks, the second of which ends so; return how all did, as `RankGroup.wait` does, and what was logged."""
    env = {"NIGHTJAR_TEST_ENDING": str(int(code))}
    group = RankGroup(Launch(module="tests.ending_rank", num_ranks=2, env=env), {})
    with caplog.at_level(logging.WARNING, "inference.rank_group"):
        try:
            return group.wait(), [re.sub(r"\(.*?\)", "()", text) for text in caplog.messages]
        finally:
            group.close()


def test_a_rank_that_is_out_of_memory_ends_all_with_what_it_was(starts, caplog):
    exit_code, logged = endings_of_two(FULL, caplog)
    assert exit_code == FULL
    assert logged == [
        "rank 0 (): ended with exit code 6: rank 1: as it was told",
        "rank 1 (): ended with exit code 6: as it was told",
    ]


def test_a_rank_that_ends_otherwise_tells_nobody_to_start_again(starts, caplog):
    exit_code, logged = endings_of_two(BROKEN, caplog)
    assert exit_code == 1
    assert logged[1] == "rank 1 (): ended with exit code 7: as it was told"
    assert "exit code 6" not in logged[0]


@pytest.mark.parametrize(
    ("ending", "exit_code", "num_starts"),
    [pytest.param(FULL, FULL, 2, marks=pytest.mark.slow), (BROKEN, 1, 1), (FINISHED, 0, 1)],
)
def test_a_further_host_starts_again_after_out_of_memory_alone_and_not_for_ever(
    starts, tmp_path, monkeypatch, ending, exit_code, num_starts
):
    monkeypatch.setenv("NIGHTJAR_TEST_ENDING", str(int(ending)))
    monkeypatch.setenv("NIGHTJAR_GPUS_PER_HOST", "1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(follow, "MOST_SHRINKS", 1)
    alone = DistributedConfig(rendezvous=f"127.0.0.1:{free_port()}")
    assert follow.join(tmp_path, alone, "tests.ending_rank") == exit_code
    assert len(starts.read_text().splitlines()) == num_starts


def test_hosts_that_start_again_wait_for_the_first_one_no_longer_than_their_timeout(monkeypatch):
    monkeypatch.setattr(launch, "_START_S", 1.0)
    rendezvous = f"127.0.0.1:{free_port()}"  # where nobody answers
    settings = DistributedConfig(num_hosts=2, rendezvous=rendezvous, timeout_s=1)
    ranks = RankProcesses(
        Launch(
            module="tests.ending_rank",
            num_ranks=1,
            distributed=settings,
            host_rank=1,
            is_again=True,
        )
    )
    try:
        assert ranks.wait(60) == 1
    finally:
        ranks.stop()


def test_who_starts_again_waits_until_the_launcher_that_ends_is_gone():
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    started_at = time.monotonic()
    threading.Timer(0.5, server.close).start()
    wait_until_gone(f"127.0.0.1:{port}")
    assert 0.4 < time.monotonic() - started_at < 5.0
