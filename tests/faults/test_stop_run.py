"""Runs that are asked to stop: leases let go, the right exit code, and the rest done by the next start."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import keys
from storage.local_store import LocalStore
from tasks.verify import verify_run
from tests.processes import Cli, children, cli_in, holders, is_alive, wait_for

NUM_SHARDS, NUM_ROWS = 8, 160
SOON = pytest.mark.parametrize("within_s", [120, pytest.param(5, marks=pytest.mark.timing)])
"""How long a process may take to end: 5 seconds on a quiet machine."""


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with cli_in(tmp_path) as cli:
        yield cli


@pytest.fixture
def job(cli: Cli, tmp_path: Path) -> Path:
    """A run of some seconds: one sequence at a time, long answers."""
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": [f"prompt {row}" for row in range(NUM_ROWS)]}), path)
    return cli.job(
        "stop",
        input__uri=str(path),
        sampling__max_tokens=2000,
        sampling__ignore_eos=True,
        shards__max_rows=NUM_ROWS // NUM_SHARDS,
        engine__max_num_seqs=1,
        hardware__replicas=1,
    )


def run_in(folder: Path) -> LocalStore | None:
    """The run's folder, as soon as something is committed."""
    found = list(folder.glob("out/*/commits/*"))
    return LocalStore(found[0].parents[1]) if found else None


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_lets_its_leases_go_and_is_taken_up_again(
    cli: Cli, job: Path, tmp_path: Path, signum: int, code: int
) -> None:
    run = cli.start("run", str(job))
    store = wait_for(lambda: run_in(tmp_path), what="the first commit")
    assert holders(store)
    run.send_signal(signum)
    _, err = run.communicate(timeout=120)
    assert run.returncode == code, err
    assert f"stopped by {signal.Signals(signum).name}" in err
    assert "Traceback" not in err
    assert holders(store) == []
    num_done = len(list(store.list(keys.COMMITS)))
    assert 0 < num_done < NUM_SHARDS
    assert list((tmp_path / "work").iterdir()) == [], "scratch files were left behind"
    assert cli.call("run", str(job)).returncode == 0
    assert verify_run(store, tmp_path).is_whole
    attempts = sum(info.key.endswith("attempt.json") for info in store.list(keys.ATTEMPTS))
    assert attempts <= NUM_SHARDS + 3, "what was committed is not done again"


def test_a_run_cancelled_by_its_marker_ends_as_partial_with_its_leases_let_go(
    cli: Cli, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": [f"prompt {row}" for row in range(NUM_ROWS)]}), path)
    job = cli.job("stop", input__uri=str(path), shards__max_rows=1, hardware__replicas=1)
    steps = ("after_lease", "after_claim", "before_commit", "after_copy")
    # A shard takes 0.2 s and the marker is looked for every ten: most of 160 are left by then.
    slow = ",".join(f"{name}:sleep:1:1" for name in steps)
    run = cli.start("run", str(job), failpoint=slow)
    store = wait_for(lambda: run_in(tmp_path), what="the first commit")
    assert cli.call("cancel", store.uri).returncode == 0
    _, err = run.communicate(timeout=60)
    assert run.returncode == 3, err
    assert holders(store) == []
    assert 0 < len(list(store.list(keys.COMMITS))) < NUM_ROWS
    assert cli.call("run", str(job)).returncode == 0
    assert verify_run(store, tmp_path).is_whole


@SOON
def test_a_stop_while_planning_is_heard_at_once(cli: Cli, tmp_path: Path, within_s: float) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "prompt {row}"}}\n' for row in range(200_000)))
    job = cli.job("stop", input__uri=str(path))
    run = cli.start("run", str(job))
    wait_for(lambda: list(tmp_path.glob("out/*/run.json")), what="planning to begin")
    feeds = wait_for(lambda: children(run.pid, "tasks.feed_child"), what="the feed")
    run.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, err = run.communicate(timeout=120)
    assert run.returncode == 143, err
    assert time.monotonic() - began < within_s
    assert "Traceback" not in err
    assert not list(tmp_path.glob("out/*/plan.json"))
    wait_for(lambda: not any(map(is_alive, feeds)), what="the feed to end")


@SOON
def test_a_second_signal_ends_at_once_and_the_run_is_taken_up_again(
    cli: Cli, job: Path, tmp_path: Path, within_s: float
) -> None:
    # A store that hangs: the first signal waits for the commit in hand, the second does not.
    run = cli.start("run", str(job), failpoint="before_commit:hang:1:0")
    wait_for(lambda: list(tmp_path.glob("out/*/_attempts/*/*/*.parquet")), what="a part")
    feeds = children(run.pid, "tasks.feed_child")
    time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.poll() is None
    began = time.monotonic()
    while (
        run.poll() is None
    ):  # on a slow machine the first may not have been heard, and is one with the second
        assert time.monotonic() - began < within_s
        run.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert run.returncode == 130
    wait_for(lambda: not any(map(is_alive, feeds)), what="the feed to end")
    assert cli.call("run", str(job)).returncode == 0
    (record,) = tmp_path.glob("out/*/run.json")
    assert verify_run(LocalStore(record.parent), tmp_path).is_whole


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_the_replicas_of_a_run_end_with_it(
    cli: Cli, job: Path, tmp_path: Path, signum: int
) -> None:
    run = cli.start("run", str(job), "--set", "hardware.replicas=3")
    wait_for(lambda: len(children(run.pid, "flows.cli drain")) == 2, what="two more replicas")
    replicas = children(run.pid, "flows.cli drain")
    store = wait_for(lambda: run_in(tmp_path), what="the first commit")
    os.kill(run.pid, signum)
    run.communicate(timeout=60)
    assert run.returncode == (143 if signum == signal.SIGTERM else -signum)
    wait_for(lambda: not any(map(is_alive, replicas)), what="the replicas to end")
    killed = [f"/{run.pid}/"] if signum == signal.SIGKILL else []
    assert [name for name in holders(store) if not any(pid in name for pid in killed)] == []
