"""Nightly schedules keep the user's local time when clocks change, and wrong ones are refused."""

import asyncio
import json
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas.schedules import CronSchedule
from prefect.server.schemas.schedules import CronSchedule as ServerCronSchedule

from flows.config import JobError
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
