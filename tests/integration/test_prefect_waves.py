"""Replicas on a work pool of their own: real server, real process workers, real kills."""

import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows.cli import main
from tests.listener import listening
from tests.prefect_server import PrefectLab, children_of, wait_for
from tests.waves_case import (
    MARKER,
    NUM_ROWS,
    NUM_SHARDS,
    SLOW,
    Case,
    ended_replicas,
    replicas,
)

pytestmark = pytest.mark.slow

LONG = 2 * NUM_ROWS
"""Rows for one replica to be at work with while a slow machine starts another."""

PROCESS = {"provider": "process", "replicas": 2}


KINDS = ("deployments", "automations", "work_pools")


@pytest.fixture(scope="module")
def lab(prefect_lab: PrefectLab) -> Iterator[PrefectLab]:
    worker = prefect_lab.start_worker("gpu-process")
    yield prefect_lab
    if worker in prefect_lab.workers:
        prefect_lab.stop_worker(worker, signal.SIGKILL)


def test_two_replicas_drain_a_run_a_killed_one_is_replaced_and_every_row_is_there_once(
    lab: PrefectLab, tmp_path: Path
) -> None:
    case = Case(tmp_path, num_rows=LONG)
    run_id = case.start(lab)
    case.wait_for_work()
    os.kill(case.holders().pop(), signal.SIGKILL)
    case.wait_until_published(lab, run_id, timeout_s=240)
    found = wait_for(partial(ended_replicas, lab, run_id), "all replicas have ended", 120)
    assert len(found) == 3
    assert [run["state_type"] for run in found].count("CRASHED") == 1
    assert all(run["parameters"]["run_uri"] == str(case.run) for run in found)
    assert MARKER.encode() not in lab.everything_stored()


def test_cancelling_stops_every_replica_within_a_minute_and_a_retry_finishes_the_run(
    lab: PrefectLab, tmp_path: Path
) -> None:
    case = Case(tmp_path, num_rows=LONG)
    run_id = case.start(lab)
    case.wait_for_work()
    lab.cancel(run_id)
    lab.wait_for_state(run_id, "CANCELLED", timeout_s=60)
    wait_for(partial(ended_replicas, lab, run_id), "no replica outlives its parent", 60)
    assert case.num_commits() < case.num_shards
    assert case.holders() == set()
    committed = {path: path.read_bytes() for path in case.run.glob("commits/*.json")}

    run_id = lab.run_deployment("retry-failed/retry", {"run_uri": str(case.run)})
    done = lab.wait_for_state(run_id, timeout_s=240)
    assert done["state_type"] == "COMPLETED", done["state"]["message"]
    assert case.is_whole()
    assert all(path.read_bytes() == data for path, data in committed.items())
    assert len(replicas(lab, run_id)) == 2


@pytest.mark.night
def test_replicas_behind_a_launcher_that_takes_a_shell_drain_a_run_and_are_stopped(
    lab: PrefectLab, tmp_path: Path
) -> None:
    worker = lab.start_worker("gpu-command", kind="command")
    # `env sh -s` stands for `ssh host sh -s`: nothing reaches it but standard input.
    variables = {"send_env": "stdin", "grace_s": 20}
    case = Case(
        tmp_path,
        provider="command",
        placement={"launcher": "env", "env": SLOW, "job_variables": variables},
    )
    run_id = case.start(lab)
    case.wait_for_work()
    lab.cancel(run_id)
    wait_for(partial(ended_replicas, lab, run_id), "no replica outlives its parent", 60)
    # Runner and worker both send SIGTERM here; the second ends a replica at once, lease or no lease.
    assert case.num_commits() < NUM_SHARDS
    case.wait_until_published(lab, case.start(lab), timeout_s=120)
    assert MARKER.encode() not in lab.everything_stored()
    lab.stop_worker(worker, signal.SIGKILL)


def test_a_misspelt_job_variable_is_refused_before_any_replica_is_started(
    lab: PrefectLab, tmp_path: Path
) -> None:
    case = Case(tmp_path, placement={"job_variables": {"workng_dir": "/"}})
    run_id = case.start(lab)
    done = lab.wait_for_state(run_id)
    assert done["state_type"] == "FAILED"
    assert done["state"]["message"].endswith("did you mean working_dir?")
    assert replicas(lab, run_id) == []


def test_a_second_nightly_start_is_cancelled_while_the_first_runs(
    lab: PrefectLab, tmp_path: Path
) -> None:
    case = Case(tmp_path, provider="local")
    first = case.start(lab, "nightly", job_variables={"env": SLOW})
    lab.wait_for_state(first, "RUNNING")
    second = case.start(lab, "nightly")
    assert lab.wait_for_state(second)["state_type"] == "CANCELLED"
    case.wait_until_published(lab, first, timeout_s=100)


def test_setting_up_again_changes_nothing_and_keeps_the_user_s_time_zone(
    lab: PrefectLab, tmp_path: Path
) -> None:
    def standing() -> dict[str, dict[str, object]]:
        """All there is, by id, without when it was last touched or found ready."""
        passing = ("updated", "created", "status", "last_polled", "schedules", "next_run")
        found = [(kind, lab.api(f"/{kind}/filter", {})) for kind in KINDS]
        return {
            f"{kind} {item['name']}": {k: v for k, v in item.items() if k not in passing}
            for kind, items in found
            for item in items
        }

    schedule = ("--job", "/etc/nightjar/n.yaml", "--cron=30 2 * * *", "--timezone=Europe/Berlin")
    lab.deploy(*schedule)
    before = standing()
    assert "automations nightjar: silent flow runs are crashed" in before
    lab.deploy(*schedule)
    assert standing() == before
    deployment = lab.api("/deployments/name/batch-generate/nightly")
    (found,) = deployment["schedules"]
    assert (found["schedule"]["cron"], found["schedule"]["timezone"]) == (
        "30 2 * * *",
        "Europe/Berlin",
    )
    assert found["active"]
    assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


def test_a_failure_is_told_to_the_webhook_in_one_line(lab: PrefectLab, tmp_path: Path) -> None:
    with listening() as (url, heard):
        lab.deploy("--webhook", url)
        run_id = lab.run_deployment("batch-generate/adhoc", {"job": str(tmp_path / "absent.yaml")})
        lab.wait_for_state(run_id, "FAILED")
        wait_for(lambda: heard, "the webhook is called", 120)
    assert "absent.yaml: not found" in heard[0]["body"]
    assert "batch-generate" in heard[0]["subject"]


def test_a_dropped_file_is_published_by_the_inbox_and_noted_as_done(
    lab: PrefectLab, tmp_path: Path
) -> None:
    box = tmp_path / "box"
    base = {
        "name": "inbox",
        "model": {"source": "none"},
        "input": {"prompt": "Say: {prompt}"},
        "output": {"uri": str(tmp_path / "results")},
        "engine": {"backend": "dummy"},
    }
    (tmp_path / "inbox.yaml").write_text(yaml.safe_dump(base))
    pq.write_table(pa.table({"prompt": [MARKER, None]}), tmp_path / "f.parquet")
    assert main(["submit", str(tmp_path / "f.parquet"), "--inbox", str(box)]) == 0
    look = {"inbox": str(box), "job": str(tmp_path / "inbox.yaml"), "settle_s": 0}
    first = lab.run_deployment("scan-inbox/inbox", look)
    assert lab.wait_for_state(first)["state"]["message"] == "1 accepted, 1 in work"
    (letter,) = box.glob("accepted/*/preflight.json")
    assert MARKER in json.loads(letter.read_text())["preflight"]["first_prompt"]
    run = Path(json.loads(letter.read_text())["run_uri"])
    wait_for((run / "manifest.json").exists, "the run is published", 120)
    again = lab.run_deployment("scan-inbox/inbox", look)
    assert lab.wait_for_state(again)["state"]["message"] == "1 done"
    (result,) = box.glob("done/*/result.json")
    assert json.loads(result.read_text())["run"] == str(run)
    assert MARKER.encode() not in lab.everything_stored()


def test_losing_the_server_and_its_database_in_the_middle_loses_no_work(
    lab: PrefectLab, tmp_path: Path
) -> None:
    case = Case(tmp_path)
    case.start(lab)
    wait_for(lambda: case.num_commits() >= 2, "shards are committed", 120)
    for worker in list(lab.workers):
        flow_runs = children_of(worker.pid)
        lab.stop_worker(worker, signal.SIGKILL)
        for pid in flow_runs:
            os.kill(pid, signal.SIGKILL)
    lab.stop_server()
    for path in (lab.folder / "home").glob("prefect.db*"):
        path.unlink()
    committed = case.num_commits()
    assert committed < NUM_SHARDS
    lab.start_server()
    lab.deploy()
    lab.start_worker()
    lab.start_worker("gpu-process")
    run_id = case.start(lab)
    case.wait_until_published(lab, run_id, timeout_s=120)


def test_a_canary_is_one_replica_and_a_bad_one_ends_the_night_before_there_is_another(
    lab: PrefectLab, tmp_path: Path
) -> None:
    case = Case(tmp_path)
    limit = {"rows": 8, "max_truncated_rate": 0.01}
    values = {**case.values, "hardware": PROCESS, "canary": limit}
    case.job.write_text(yaml.safe_dump(values))
    run_id = lab.run_deployment("batch-generate/adhoc", case.parameters)
    done = lab.wait_for_state(run_id, timeout_s=200)
    assert done["state_type"] == "FAILED"
    assert "truncated_rate is" in done["state"]["message"], done["state"]["message"]
    found = wait_for(partial(ended_replicas, lab, run_id), "the replica has ended", 120)
    assert len(found) == 1
    assert pq.read_table(case.run / "_canary.parquet").num_rows == 8
    assert case.num_commits() == 0
    told = (case.run / "_canary.json").read_bytes()

    # The limit was wrong, not the prompt: the sample is not run again, and its answers are kept. The budget
    # then ends the run after some shards, and a larger one finishes it.
    dollars = {"hardware": {**PROCESS, "price_per_hour": 3600.0}}
    slow = {"placement": {"env": SLOW}}
    poor = {"hardware": {**dollars["hardware"], **slow}, "budget": {"usd": 3.0}}
    case.job.write_text(yaml.safe_dump({**values, "canary": {"rows": 8}, **poor}))
    run_id = lab.run_deployment("batch-generate/adhoc", case.parameters)
    done = lab.wait_for_state(run_id, timeout_s=200)
    assert done["state_type"] == "FAILED"
    assert "budget.usd is 3.00" in done["state"]["message"], done["state"]["message"]
    committed = {path: path.read_bytes() for path in case.run.glob("commits/*.json")}
    assert 0 < len(committed) < NUM_SHARDS
    assert (case.run / "_canary.json").read_bytes() == told

    rich = {**dollars, "budget": {"usd": 1e6}, "deadline": "2026-01-01T00:00+00:00"}
    case.job.write_text(yaml.safe_dump({**values, "canary": {"rows": 8}, **rich}))
    run_id = lab.run_deployment("batch-generate/adhoc", case.parameters)
    done = lab.wait_for_state(run_id, timeout_s=200)
    assert done["state_type"] == "COMPLETED", done["state"]["message"]
    assert {path: path.read_bytes() for path in committed} == committed
    assert case.is_whole()
    assert_artifacts(lab, run_id)
    where = {"logs": {"flow_run_id": {"any_": [run_id]}}}
    said = wait_for(
        lambda: [
            log["message"] for log in lab.api("/logs/filter", where) if "late" in log["message"]
        ],
        "the flow's log says that it is late",
        120,
    )
    assert "past the deadline 2026-01-01T00:00+00:00" in said[0]
    assert MARKER.encode() not in lab.everything_stored()


def assert_artifacts(lab: PrefectLab, run_id: str) -> None:
    """A progress bar and a table, one of each, that say how the run ended."""
    where = {"artifacts": {"flow_run_id": {"any_": [run_id]}}}
    artifacts = {found["type"]: found for found in lab.api("/artifacts/filter", where)}
    assert set(artifacts) == {"progress", "table"}
    assert artifacts["progress"]["data"] == 100.0
    table = {row["what"]: row["value"] for row in json.loads(artifacts["table"]["data"])}
    assert table["rows"] == f"{NUM_ROWS} of {NUM_ROWS}"
    assert table["shards"] == f"{NUM_SHARDS} of {NUM_SHARDS}"
    assert float(table["spent, $"]) > 0
