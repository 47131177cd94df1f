"""Runs through a real Prefect server and a real process worker, as `prefect deployment run` starts them."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows.cli import main
from tests.prefect_server import PREFECT, ROOT, PrefectLab, end, wait_for

pytestmark = pytest.mark.slow

MARKER = "okapi-7c41-marker"
SECRETS = {
    name: f"secret-{number}-c9d2"
    for number, name in enumerate(
        ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "DATABASE_PASSWORD")
    )
}
NUM_ROWS = 60

# Fifty milliseconds at each of these moments of a shard: a run long enough to be interrupted.
SLOW = ",".join(
    f"{name}:sleep:1:1"
    for name in ("after_lease", "after_claim", "before_commit", "after_copy", "local_before_rename")
)


@dataclass(frozen=True)
class Case:
    """One job of 60 rows in 30 shards, in a folder of its own."""

    folder: Path
    job: Path

    @property
    def parameters(self) -> dict[str, object]:
        return {"job": str(self.job)}

    @property
    def run(self) -> Path:
        (found,) = (self.folder / "out").glob("case-*")
        return found

    def num_commits(self) -> int:
        return len(list((self.folder / "out").glob("case-*/commits/*.json")))

    def attempts(self) -> int:
        return len(list(self.run.glob("_attempts/*/*/attempt.json")))

    def held_leases(self) -> list[str]:
        found = [json.loads(p.read_text())["holder"] for p in self.run.glob("_leases/0*.json")]
        return [holder for holder in found if holder]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    texts = [f"{MARKER} tell me {row} things" for row in range(NUM_ROWS)]
    texts[5] = None
    pq.write_table(pa.table({"id": range(NUM_ROWS), "prompt": texts}), tmp_path / "in.parquet")
    job = {
        "name": "case",
        "model": {"source": "none"},
        "input": {
            "uri": str(tmp_path / "in.parquet"),
            "prompt": f"{MARKER}: {{prompt}}",
            "id_column": "id",
        },
        "output": {"uri": str(tmp_path / "out")},
        "sampling": {"max_tokens": 8},
        "shards": {"max_rows": 2},
        "engine": {"backend": "dummy"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return Case(tmp_path, tmp_path / "job.yaml")


def watched(lab: PrefectLab, job: Path) -> subprocess.CompletedProcess[str]:
    command = (*PREFECT, "deployment", "run", "batch-generate/adhoc", "-p", f"job={job}")
    return lab.call(*command, "--watch", "--watch-timeout", "100")


def latest_run(lab: PrefectLab, job: Path) -> dict[str, object]:
    runs = lab.api("/flow_runs/filter", {"sort": "START_TIME_DESC"})
    return next(run for run in runs if run["parameters"].get("job") == str(job))


def task_run_names(lab: PrefectLab, run_id: str, count: int) -> list[str]:
    """The server records task runs a little later than they happen."""

    def recorded() -> list[str]:
        names = sorted(task["name"] for task in lab.task_runs(run_id))
        return names if len(names) >= count else []

    return wait_for(recorded, f"{count} task runs are recorded", 120)


def test_a_deployment_run_publishes_and_the_next_has_nothing_left_to_do(
    prefect_lab: PrefectLab, case: Case
) -> None:
    done = watched(prefect_lab, case.job)
    assert done.returncode == 0, done.stdout + done.stderr + prefect_lab.logs()
    assert main(["verify", str(case.run), "--json"]) == 0
    run = latest_run(prefect_lab, case.job)
    assert run["state"]["message"].endswith(
        "published, 60 rows: 5 ok, 54 truncated, 1 invalid_input"
    )
    shards = [f"shard-{i:05d}" for i in range(30)]
    assert task_run_names(prefect_lab, run["id"], 32) == ["plan", "publish", *shards]
    attempts, manifest = case.attempts(), (case.run / "manifest.json").read_bytes()

    run_id = prefect_lab.run_deployment("batch-generate/adhoc", case.parameters)
    assert prefect_lab.wait_for_state(run_id)["state_type"] == "COMPLETED"
    assert case.attempts() == attempts
    assert (case.run / "manifest.json").read_bytes() == manifest
    assert not list(case.run.glob("manifest.r*"))

    stored = prefect_lab.everything_stored()
    assert str(case.job).encode() in stored  # it is the right database
    assert MARKER.encode() not in stored


def test_a_wrong_job_ends_failed_with_one_line(prefect_lab: PrefectLab, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("model: {source: none}\ninptu: {}\n")
    done = watched(prefect_lab, tmp_path / "job.yaml")
    assert done.returncode == 1
    run = latest_run(prefect_lab, tmp_path / "job.yaml")
    assert run["state_type"] == "FAILED"
    assert run["state"]["message"] == "inptu: unknown key; did you mean input?"


def test_a_cancelled_flow_run_releases_its_leases_and_is_taken_up_again(
    prefect_lab: PrefectLab, case: Case
) -> None:
    slowly = {"env": {"NIGHTJAR_FAILPOINT": SLOW}}
    run_id = prefect_lab.run_deployment(
        "batch-generate/adhoc", case.parameters, job_variables=slowly
    )
    wait_for(lambda: case.num_commits() >= 2, "two shards are committed", 60)
    prefect_lab.cancel(run_id)
    prefect_lab.wait_for_state(run_id, "CANCELLED", timeout_s=60)
    committed = case.num_commits()
    assert committed < 30
    assert not (case.run / "manifest.json").exists()
    assert case.held_leases() == []

    run_id = prefect_lab.run_deployment("batch-generate/adhoc", case.parameters)
    assert prefect_lab.wait_for_state(run_id)["state_type"] == "COMPLETED"
    assert main(["verify", str(case.run), "--json"]) == 0
    assert len(task_run_names(prefect_lab, run_id, 32 - committed)) == 32 - committed


def nightjar(lab: PrefectLab, *args: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *args],
        cwd=ROOT,
        env={**lab.env, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_nightjar_run_is_a_flow_run_of_the_configured_server_with_the_same_exit_codes(
    prefect_lab: PrefectLab, case: Case
) -> None:
    run = nightjar(prefect_lab, "run", str(case.job), "--json", **SECRETS)
    out, err = run.communicate(timeout=100)
    assert run.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["is_published"]
    recorded = latest_run(prefect_lab, case.job)
    assert recorded["state_type"] == "COMPLETED"
    assert recorded["deployment_id"] is None
    assert len(task_run_names(prefect_lab, recorded["id"], 32)) == 32

    strict = nightjar(prefect_lab, "run", str(case.job), "--json", "--set", "max_failed_rows=0")
    out, err = strict.communicate(timeout=100)
    assert strict.returncode == 5, err
    failed = latest_run(prefect_lab, case.job)
    assert failed["state_type"] == "FAILED"
    assert failed["state"]["message"].endswith("1 rows failed, max_failed_rows allows 0")

    url = f"https://me:{SECRETS['DATABASE_PASSWORD']}@store.example"
    places = ("--set", f"storage.endpoint_url={url}", "--set", "output.uri=s3://bucket/runs")
    wrong = nightjar(prefect_lab, "run", str(case.job), *places, **SECRETS)
    out, err = wrong.communicate(timeout=100)
    assert wrong.returncode == 2, err
    assert err.strip().splitlines()[-1].startswith("nightjar run: ")
    assert "user or password" in err
    assert latest_run(prefect_lab, case.job)["id"] == failed["id"], (
        "no flow run recorded its settings"
    )
    stored = prefect_lab.everything_stored()
    for secret in SECRETS.values():
        assert secret not in out + err
        assert secret.encode() not in stored


def test_nightjar_run_cancelled_by_the_marker_is_partial_and_its_flow_run_cancelled(
    prefect_lab: PrefectLab, case: Case
) -> None:
    run = nightjar(prefect_lab, "run", str(case.job), NIGHTJAR_FAILPOINT=SLOW)
    try:
        wait_for(lambda: case.num_commits() >= 1, "a shard is committed", 60)
        assert main(["cancel", str(case.run)]) == 0
        _, err = run.communicate(timeout=100)
    finally:
        end(run, signal.SIGKILL)
    assert run.returncode == 3, err
    assert latest_run(prefect_lab, case.job)["state_type"] == "CANCELLED"
    assert case.held_leases() == []


def test_nightjar_run_stopped_by_sigterm_leaves_a_run_that_resumes(
    prefect_lab: PrefectLab, case: Case
) -> None:
    run = nightjar(prefect_lab, "run", str(case.job), NIGHTJAR_FAILPOINT=SLOW)
    try:
        wait_for(lambda: case.num_commits() >= 2, "two shards are committed", 60)
        os.kill(run.pid, signal.SIGTERM)
        _, err = run.communicate(timeout=60)
    finally:
        end(run, signal.SIGKILL)
    assert run.returncode == 143, err
    assert case.held_leases() == []
    assert main(["run", str(case.job), "--json"]) == 0
    assert main(["verify", str(case.run), "--json"]) == 0
