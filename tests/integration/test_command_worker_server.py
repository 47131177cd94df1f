"""The `command` worker against a real Prefect server: a flow run ends, and a misspelt one is crashed."""

import asyncio
import os

import pytest
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.flows import load_flow_from_entrypoint
from prefect.states import Scheduled
from prefect.testing.utilities import prefect_test_harness

from flows.command_worker import CommandWorker

FLOW = """
import os, pathlib
from prefect import flow

@flow(name="touch")
def touch(path: str) -> None:
    pathlib.Path(path).write_text(os.environ["FROM_LAUNCHER"])
"""


@pytest.mark.slow
def test_a_flow_run_goes_through_its_launcher_and_a_misspelt_variable_crashes_it(
    tmp_path, monkeypatch
):
    # As when the worker's environment was never activated: only its interpreter knows `prefect`.
    monkeypatch.setenv("PATH", os.defpath)
    (tmp_path / "touch_flow.py").write_text(FLOW)
    with prefect_test_harness(server_startup_timeout=120):
        good, bad = asyncio.run(run_two(tmp_path))
    assert good.state.is_completed(), good.state.message
    assert (tmp_path / "touched").read_text() == "yes"
    assert bad.state.is_crashed()
    assert "did you mean launcher" in bad.state.message


async def run_two(folder):
    async with get_client() as client:
        await client.create_work_pool(
            WorkPoolCreate(
                name="launcher",
                type="command",
                base_job_template=CommandWorker.get_default_base_job_template(),
            )
        )
        flow = load_flow_from_entrypoint(f"{folder}/touch_flow.py:touch")
        deployment_id = await client.create_deployment(
            flow_id=await client.create_flow(flow),
            name="replica",
            work_pool_name="launcher",
            entrypoint="touch_flow.py:touch",
            path=str(folder),
            pull_steps=[
                {"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}
            ],
        )
        runs = [
            await client.create_flow_run_from_deployment(
                deployment_id,
                parameters={"path": str(folder / "touched")},
                state=Scheduled(),
                job_variables=variables,
            )
            for variables in ({"launcher": "env FROM_LAUNCHER=yes"}, {"launchr": "env"})
        ]
        async with CommandWorker(work_pool_name="launcher") as worker:
            await worker.get_and_submit_flow_runs()
        return [await client.read_flow_run(run.id) for run in runs]
