"""Nightly schedules keep the user's local time when clocks change, and wrong ones are refused."""

import asyncio
import json
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas.schedules import CronSchedule
from prefect.server.schemas.schedules import CronSchedule as ServerCronSchedule

from flows.config import JobError, load_job
from flows.deploy import Settings, default_folder, planned_deployments

CASE = json.loads(
    (
        Path(__file__).parents[1] / "data" / "cases" / "H2-schedule-and-clock-change" / "case.json"
    ).read_text()
)
CRONS = {item["timezone"]: item["cron"] for item in CASE["run"]["schedules"]}


@pytest.mark.parametrize("when", CASE["expect"]["next_runs_utc"])
def test_a_nightly_schedule_is_local_time_also_when_clocks_change(when):
    timezone, _, start = when.partition(" from ")
    expected = [text.split()[0] for text in CASE["expect"]["next_runs_utc"][when]]
    document = planned_deployments(
        Settings(folder=default_folder(), job="job.yaml", cron=CRONS[timezone], timezone=timezone)
    )
    (nightly,) = [item for item in document["deployments"] if item["name"] == "nightly"]
    (schedule,) = nightly["schedules"]
    assert schedule["timezone"] == timezone
    assert schedule["active"]
    server = ServerCronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    dates = asyncio.run(server.get_dates(len(expected), start=datetime.fromisoformat(start)))
    assert [date.astimezone(tz=None).timestamp() for date in dates] == [
        datetime.fromisoformat(text).timestamp() for text in expected
    ]


@pytest.mark.parametrize(
    ("cron", "timezone", "named"),
    [("0 22 * *", "Europe/Berlin", "0 22 \\* \\*"), ("0 22 * * *", "Europe/Berlinn", "Berlinn")],
)
def test_a_wrong_cron_or_zone_is_refused_when_it_is_set(cron, timezone, named):
    with pytest.raises(JobError, match=named):
        planned_deployments(
            Settings(folder=default_folder(), job="job.yaml", cron=cron, timezone=timezone)
        )


def test_only_the_deployments_of_the_wanted_providers_are_set_up():
    document = planned_deployments(Settings(folder=default_folder(), providers=("kubernetes",)))
    names = {item["name"] for item in document["deployments"]}
    assert "kubernetes" in names
    assert not names & {"replica", "ecs", "command", "stage"}


def test_every_deployment_names_a_flow_that_is_there_and_says_what_a_collision_does():
    from prefect.flows import load_flow_from_entrypoint

    document = yaml.safe_load((default_folder() / "prefect.yaml").read_text())
    for deployment in document["deployments"]:
        flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
        assert set(deployment.get("parameters", {})) <= set(flow.parameters.properties)
        limit = deployment.get("concurrency_limit")
        assert limit is None or limit["collision_strategy"] in ("ENQUEUE", "CANCEL_NEW")
    assert CronSchedule(cron="0 22 * * *", timezone="Europe/Berlin").timezone == "Europe/Berlin"


def job_file(folder, **changes):
    values = {
        "model": {"source": "none"},
        "input": {"uri": str(folder / "in.parquet"), "prompt_column": "prompt"},
        "output": {"uri": str(folder / "out")},
        "engine": {"backend": "dummy"},
        **changes,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    return folder / "job.yaml"


def parameters(name, **settings):
    document = planned_deployments(Settings(folder=default_folder(), **settings))
    (found,) = [item for item in document["deployments"] if item["name"] == name]
    return found["parameters"]


def test_paths_given_from_here_are_found_by_workers_that_start_elsewhere(tmp_path, monkeypatch):
    job_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert parameters("nightly", job="job.yaml") == {"job": str(tmp_path / "job.yaml")}
    assert parameters("nightly", job="s3://b/job.yaml") == {"job": "s3://b/job.yaml"}
    found = parameters("inbox", inbox="night", inbox_job="/etc/nightjar/inbox.yaml")
    assert found == {"inbox": str(tmp_path / "night"), "job": "/etc/nightjar/inbox.yaml"}


def test_an_inbox_s_job_needs_no_input_of_its_own(tmp_path):
    job = job_file(tmp_path, input={"prompt_column": "prompt"})
    assert parameters("inbox", inbox="s3://b/night", inbox_job=str(job))["job"] == str(job)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"output": {"uri": "results"}}, "output.uri: results is relative"),
        ({"model": {"source": ".demo/smollm2"}}, "model.source: .demo/smollm2 is relative"),
        ({"input": {"uri": ["/a.parquet", "b.parquet"]}}, "input.uri: b.parquet is relative"),
        ({"input": {"uri": "/a", "chat_template": "t.jinja"}}, "input.chat_template: t.jinja"),
    ],
)
def test_a_job_for_workers_may_not_hold_a_relative_path(tmp_path, section, named):
    job = job_file(tmp_path, **section)
    with pytest.raises(JobError, match=named):
        parameters("nightly", job=str(job))
    assert Path(load_job(job).output.uri).name in ("results", "out")  # by hand it may
