"""What a night does to a Prefect server, its workers and its replicas; each run is verified whole at the end.

    python -m pytest -m night tests/faults/test_prefect_nights.py

Real server, real workers, real SIGKILL. The stated times are upper bounds on two shared cores.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from flows.cli import main
from tests.listener import listening
from tests.prefect_server import PREFECT, PrefectLab, children_of, end, wait_for
from tests.waves_case import NUM_SHARDS, Case, ended_replicas, replicas

pytestmark = [pytest.mark.night, pytest.mark.timeout(1200)]

POOL = "gpu-process"
WORK_S, END_S, SILENT_S = 180, 300, 360
"""Until replicas are at work, until a run is published, and that when silence must be noticed first."""


@pytest.fixture
def worker(prefect_lab: PrefectLab) -> "Iterator[subprocess.Popen[bytes]]":
    """The worker of the replicas' pool; whoever kills it starts another."""
    yield prefect_lab.start_worker(POOL)
    for left in prefect_lab.workers[1:]:
        prefect_lab.stop_worker(left, signal.SIGKILL)


def working(case: Case, lab: PrefectLab, num_replicas: int = 2) -> str:
    """Start the job; return the flow run once its replicas are at work."""
    run_id = case.start(lab)
    case.wait_for_work(num_replicas, timeout_s=WORK_S)
    return run_id


def test_a_killed_worker_takes_its_replicas_along_and_the_next_worker_goes_on(
    prefect_lab: PrefectLab, worker: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    case = Case(tmp_path)
    run_id = working(case, prefect_lab)
    prefect_lab.stop_worker(worker, signal.SIGKILL)
    ended = ("CRASHED", "COMPLETED")
    wait_for(
        lambda: {run["state_type"] for run in replicas(prefect_lab, run_id)[:2]} <= {*ended},
        "both replicas have ended, and said so",
        60,
    )
    assert case.holders() == set(), "their leases are released"
    prefect_lab.start_worker(POOL)  # as a supervisor does
    case.wait_until_published(prefect_lab, run_id, timeout_s=END_S)


def test_a_lost_machine_is_noticed_by_its_silence_told_by_webhook_and_replaced(
    prefect_lab: PrefectLab, worker: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    case = Case(tmp_path)
    with listening() as (url, heard):
        prefect_lab.deploy("--webhook", url)
        run_id = working(case, prefect_lab)
        # Worker and replicas at once, as when the power goes: nobody is left to report it.
        os.kill(worker.pid, signal.SIGSTOP)
        family = children_of(worker.pid) | case.holders()
        prefect_lab.stop_worker(worker, signal.SIGKILL)
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        lost_at = time.monotonic()
        committed = case.num_commits()
        assert committed < NUM_SHARDS
        prefect_lab.start_worker(POOL)
        wait_for(lambda: len(heard) >= 2, "two replicas are told of", SILENT_S)
        print(f"told {time.monotonic() - lost_at:.0f} s after the machine was lost")
        case.wait_until_published(prefect_lab, run_id, timeout_s=SILENT_S)
        print(f"published {time.monotonic() - lost_at:.0f} s after the machine was lost")
    crashed = [run for run in replicas(prefect_lab, run_id) if run["state_type"] == "CRASHED"]
    assert [run["state"]["message"] for run in crashed] == ["no heartbeat for 120 s"] * 2
    assert {told["subject"] for told in heard} == {"Nightjar: generate-shards Crashed"}
    assert all(told["body"].endswith(": no heartbeat for 120 s") for told in heard)
    assert case.num_commits() == NUM_SHARDS


def test_a_server_that_restarts_in_the_middle_is_waited_for(
    prefect_lab: PrefectLab, worker: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    case = Case(tmp_path)
    run_id = working(case, prefect_lab)
    prefect_lab.stop_server()
    assert case.num_commits() < NUM_SHARDS
    time.sleep(10)
    prefect_lab.start_server()
    case.wait_until_published(prefect_lab, run_id, timeout_s=END_S)


def test_the_marker_stops_every_replica_within_a_minute_while_prefect_is_away(
    prefect_lab: PrefectLab, worker: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    case = Case(tmp_path)
    run_id = working(case, prefect_lab)
    prefect_lab.stop_server()
    asked_at = time.monotonic()
    assert main(["cancel", str(case.run)]) == 0
    committed = case.num_commits()
    wait_for(lambda: not case.holders(), "every lease is released", 60)
    print(f"stopped {time.monotonic() - asked_at:.0f} s after the marker")
    stopped_with = case.num_commits()
    assert committed <= stopped_with < NUM_SHARDS
    prefect_lab.start_server()
    prefect_lab.wait_for_state(run_id, "CANCELLED", timeout_s=120)
    assert case.num_commits() == stopped_with
    case.wait_until_published(prefect_lab, case.start(prefect_lab), timeout_s=END_S)


@pytest.mark.usefixtures("worker")
def test_the_same_flow_run_started_twice_gives_every_row_once(
    prefect_lab: PrefectLab, tmp_path: Path
) -> None:
    case = Case(tmp_path)
    run_id = working(case, prefect_lab)
    started = [run_id, *(run["id"] for run in replicas(prefect_lab, run_id))]
    assert len(started) == 3
    # As a Job that Kubernetes replaced on its own: the same flow runs in other processes.
    doubles = [
        subprocess.Popen(
            [*PREFECT, "flow-run", "execute", flow_run_id],
            env=prefect_lab.env,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for flow_run_id in started
    ]
    try:
        wait_for(lambda: (case.run / "manifest.json").exists(), "published", END_S)
        wait_for(partial(ended_replicas, prefect_lab, run_id), "all replicas ended", END_S)
    finally:
        for double in doubles:
            end(double, signal.SIGTERM)
    assert case.is_whole()
    assert case.num_commits() == NUM_SHARDS
    assert not list(case.run.glob("manifest.r*"))


@pytest.mark.usefixtures("worker")
def test_a_late_run_gets_replicas_up_to_the_pool_s_limit_and_none_are_left_at_the_end(
    prefect_lab: PrefectLab, tmp_path: Path
) -> None:
    case = Case(tmp_path, num_rows=800, replicas=1)  # 400 shards: minutes for one replica
    case.values["deadline"] = "2026-01-01T06:00"
    case.write()
    limit = [*PREFECT, "work-pool", "set-concurrency-limit", POOL, "3"]
    assert prefect_lab.call(*limit).returncode == 0
    try:
        run_id = case.start(prefect_lab)
        seen: list[int] = []

        def is_over() -> bool:
            live = [run for run in replicas(prefect_lab, run_id) if run["state_type"] == "RUNNING"]
            seen.append(len(live))
            return (case.run / "manifest.json").exists()

        case.wait_for_work(1, timeout_s=WORK_S)
        wait_for(is_over, "published", END_S)
        case.wait_until_published(prefect_lab, run_id, timeout_s=60)
        found = wait_for(partial(ended_replicas, prefect_lab, run_id), "none is left", END_S)
    finally:
        prefect_lab.call(*PREFECT, "work-pool", "clear-concurrency-limit", POOL)
    print(f"most replicas at once: {max(seen)}")
    assert seen[0] <= 1, "as many as were asked for"
    assert max(seen) == 3, "more when late, and no more than the pool gives"
    assert len(found) == 3
