"""Replicas as ECS tasks: the real Prefect ECS worker against moto's ECS; tasks are processes.

    python -m pytest -m cluster tests/cluster/test_ecs.py       # needs provision-test and moto[server]

moto checks requests as botocore does and places tasks by CPU and memory; it knows no GPUs, so that
what is asked of them is read back from what was registered.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.fake_kubelet import ROOT, image_env, make_programs
from tests.prefect_server import PrefectLab, wait_for
from tests.waves_case import SLOW, Case, ended_replicas, replicas

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

END_S = 480
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "moto",
    "AWS_SECRET_ACCESS_KEY": "moto",
    "AWS_DEFAULT_REGION": "eu-west-1",
}


class FakeAgent:
    """One container instance; runs each task that ECS places on it as a local process."""

    def __init__(self, endpoint_url: str, folder: Path) -> None:
        import boto3

        self.folder = folder
        session = boto3.session.Session(
            aws_access_key_id="moto", aws_secret_access_key="moto", region_name="eu-west-1"
        )
        self.ecs = session.client("ecs", endpoint_url=endpoint_url)
        self.ec2 = session.client("ec2", endpoint_url=endpoint_url)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def start(self) -> None:
        make_programs(self.folder / "programs")
        self.ecs.create_cluster(clusterName="gpu")
        (image, *_) = self.ec2.describe_images()["Images"]
        found = self.ec2.run_instances(ImageId=image["ImageId"], MinCount=1, MaxCount=1)
        document = {
            "instanceId": found["Instances"][0]["InstanceId"],
            "region": "eu-west-1",
            "accountId": "123456789012",
        }
        self.ecs.register_container_instance(
            cluster="gpu", instanceIdentityDocument=json.dumps(document)
        )
        self._thread.start()

    def stop(self) -> None:
        self._closed.set()
        self._thread.join()
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.ecs.close()
        self.ec2.close()

    def tasks(self) -> list[dict[str, Any]]:
        arns = self.ecs.list_tasks(cluster="gpu")["taskArns"]
        return self.ecs.describe_tasks(cluster="gpu", tasks=arns)["tasks"] if arns else []

    def _watch(self) -> None:
        while not self._closed.wait(0.5):
            for task in self.tasks():
                if task["taskArn"] not in self.processes:
                    self.processes[task["taskArn"]] = self._run(task)

    def _run(self, task: dict[str, Any]) -> "subprocess.Popen[bytes]":
        (override,) = task["overrides"]["containerOverrides"]
        given = {entry["name"]: entry["value"] for entry in override["environment"]}
        with (self.folder / f"task-{len(self.processes)}.log").open("wb") as log:
            return subprocess.Popen(
                [ROOT / "deployments" / "entrypoint.sh", *override["command"]],
                cwd=self.folder,
                env={**image_env(self.folder / "programs", self.folder), **given},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeAgent, str]]:
    for package in ("prefect_aws", "flask_cors"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("needs the provision-test extra and moto[server]")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    agent = FakeAgent(f"http://{host}:{port}", tmp_path_factory.mktemp("ecs"))
    try:
        agent.start()
        yield agent, f"http://{host}:{port}"
        agent.stop()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def lab(agent: tuple[FakeAgent, str], prefect_lab: PrefectLab) -> PrefectLab:
    env = {**CREDENTIALS, "AWS_ENDPOINT_URL": agent[1]}
    # No queue of ECS events here; silence is noticed by Prefect's heartbeats.
    env["PREFECT_INTEGRATIONS_AWS_ECS_OBSERVER_ENABLED"] = "false"
    prefect_lab.start_worker("gpu-ecs", kind="ecs", **env)
    return prefect_lab


def case_in(folder: Path, **job_variables: Any) -> Case:
    variables = {"cluster": "gpu", "cpu": 512, "memory": 2048, "shm_mib": 256, **job_variables}
    return Case(
        folder, provider="ecs", replicas=2, placement={"env": SLOW, "job_variables": variables}
    )


def test_two_tasks_with_gpus_drain_a_run(
    lab: PrefectLab, agent: tuple[FakeAgent, str], tmp_path: Path
) -> None:
    case = case_in(tmp_path, gpu_count="4")
    run_id = case.start(lab)
    case.wait_until_published(lab, run_id, timeout_s=END_S)
    ended = wait_for(partial(ended_replicas, lab, run_id), "all replicas have ended", 120)
    # One that started after the last shard was taken is called off.
    assert {run["state_type"] for run in ended} <= {"COMPLETED", "CANCELLED"}
    tasks = agent[0].tasks()
    assert len(tasks) == len(ended) == 2
    gpus = [{"type": "GPU", "value": "4"}]
    for task in tasks:
        (override,) = task["overrides"]["containerOverrides"]
        assert override["resourceRequirements"] == gpus
        arn = task["taskDefinitionArn"]
        found = agent[0].ecs.describe_task_definition(taskDefinition=arn)["taskDefinition"]
        (container,) = found["containerDefinitions"]
        assert container["resourceRequirements"] == gpus
        assert container["linuxParameters"]["sharedMemorySize"] == 256
        assert found["requiresCompatibilities"] == ["EC2"]


def test_a_task_that_fits_no_instance_is_told_and_ends_the_run(
    lab: PrefectLab, tmp_path: Path
) -> None:
    case = case_in(tmp_path, memory=900_000)
    done = lab.wait_for_state(case.start(lab), timeout_s=END_S)
    assert done["state_type"] == "FAILED"
    assert "waves of replicas committed nothing" in done["state"]["message"]
    assert "RuntimeError: Failed to run ECS task" in done["state"]["message"]
    assert {run["state_type"] for run in replicas(lab, done["id"])} == {"CRASHED"}
