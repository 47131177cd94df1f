"""Replicas as Kubernetes Jobs: real API server, scheduler, Job controller and Prefect worker; pods are processes.

    bash tests/cluster/build_control_plane.sh ~/kubernetes        # once; Debian, ten minutes
    NIGHTJAR_KUBERNETES=~/kubernetes python -m pytest -m cluster tests/cluster

Whatever happens to a pod, the run is whole at the end, and the time it may take is stated.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.fake_kubelet import FakeKubelet
from tests.pipeline import MODELS
from tests.prefect_server import PrefectLab, wait_for
from tests.waves_case import NUM_SHARDS, SLOW, Case, replicas

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

START_S, END_S = 240, 480
"""For replicas to be at work, and for a run to be published: two shared cores."""
CANCEL_S = 60
MERGE = "application/merge-patch+json"


def case_in(folder: Path, *, replicas: int = 1, **job_variables: Any) -> Case:
    placement = {"env": SLOW, "job_variables": job_variables}
    return Case(
        folder,
        provider="kubernetes",
        replicas=replicas,
        max_replicas=replicas,
        placement=placement,
    )


def unschedulable(plane: ControlPlane) -> list[dict[str, Any]]:
    """The pods that the scheduler has found no node for."""
    pending = [pod for pod in plane.pods() if pod["status"]["phase"] == "Pending"]
    return [pod for pod in pending if pod["status"].get("conditions")]


def told(lab: PrefectLab, flow_run_id: str) -> str:
    """Everything that is logged of a flow run, the worker's lines included."""
    where = {"logs": {"flow_run_id": {"any_": [flow_run_id]}}}
    return "\n".join(line["message"] for line in lab.api("/logs/filter", where))


def one_at_work(case: Case, node: FakeKubelet) -> str:
    """Wait for a replica that commits; return its pod."""
    wait_for(lambda: case.num_commits() >= 2 and node.running(), "a replica works", START_S)
    (pod,) = node.running()
    return pod


def test_a_third_replica_waits_for_gpus_and_no_node_is_overbooked(
    lab: PrefectLab, node: FakeKubelet, plane: ControlPlane, folder: Path
) -> None:
    case = case_in(folder, replicas=3, gpu_count=4)
    run_id = case.start(lab)
    wait_for(lambda: len(node.running()) == 2, "two pods of four GPUs run", START_S)
    (waiting,) = wait_for(lambda: unschedulable(plane), "one waits", 60)
    assert "Insufficient nvidia.com/gpu" in waiting["status"]["conditions"][0]["message"]
    flow_run_id = waiting["metadata"]["labels"]["prefect.io/flow-run-id"]
    wait_for(
        lambda: "Insufficient nvidia.com/gpu" in told(lab, flow_run_id), "Prefect says why", 60
    )
    case.wait_until_published(lab, run_id, timeout_s=END_S)
    assert node.most_gpus == 8
    limits = waiting["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"memory": "48Gi", "nvidia.com/gpu": "4"}


def test_a_replica_killed_for_memory_is_crashed_by_name_and_replaced(
    lab: PrefectLab, node: FakeKubelet, folder: Path
) -> None:
    case = case_in(folder)
    run_id = case.start(lab)
    killed = one_at_work(case, node)
    node.kill_for_memory(killed)
    case.wait_until_published(lab, run_id, timeout_s=END_S)
    found = replicas(lab, run_id)
    assert sorted(run["state_type"] for run in found) == ["COMPLETED", "CRASHED"]
    (crashed,) = (run for run in found if run["state_type"] == "CRASHED")
    assert "OOMKilled" in crashed["state"]["message"] + told(lab, crashed["id"])


def test_an_evicted_replica_releases_its_lease_and_another_goes_on(
    lab: PrefectLab, node: FakeKubelet, plane: ControlPlane, folder: Path
) -> None:
    case = case_in(folder)
    run_id = case.start(lab)
    evicted = one_at_work(case, node)
    before = case.num_commits()
    plane.evict(evicted)
    wait_for(lambda: evicted not in node.running(), "the pod ends within its grace", 120)
    assert case.num_commits() < NUM_SHARDS, "it was evicted in the middle"
    case.wait_until_published(lab, run_id, timeout_s=END_S)
    assert before < case.num_commits() == NUM_SHARDS
    assert len(node.processes) > 1


def test_a_manifest_that_the_api_server_refuses_is_told_in_its_own_words(
    lab: PrefectLab, folder: Path
) -> None:
    case = case_in(folder, memory_limit="200Gigs")
    run_id = case.start(lab)
    done = lab.wait_for_state(run_id, timeout_s=END_S)
    assert done["state_type"] == "FAILED"
    assert "waves of replicas committed nothing" in done["state"]["message"]
    assert "quantities must match the regular expression" in done["state"]["message"]
    found = replicas(lab, run_id)
    assert {run["state_type"] for run in found} == {"CRASHED"}
    assert len(found) <= 3


def test_cancelling_the_parent_ends_every_pod_within_a_minute(
    lab: PrefectLab, node: FakeKubelet, folder: Path
) -> None:
    case = case_in(folder, replicas=2)
    run_id = case.start(lab)
    wait_for(lambda: case.num_commits() >= 2 and len(node.running()) == 2, "both work", START_S)
    asked_at = time.monotonic()
    lab.cancel(run_id)
    wait_for(lambda: not node.running(), "no pod outlives its parent", CANCEL_S)
    print(f"all pods ended {time.monotonic() - asked_at:.0f} s after the cancellation")
    lab.wait_for_state(run_id, "CANCELLED", timeout_s=CANCEL_S)
    assert case.num_commits() < NUM_SHARDS
    assert case.holders() == set()


def test_a_tier_chosen_for_a_model_is_scheduled_on_the_node_that_has_its_gpu(
    lab: PrefectLab, node: FakeKubelet, plane: ControlPlane, folder: Path
) -> None:
    other = FakeKubelet(plane, name="node-l4", gpus=1, product="NVIDIA-L4")
    other.start()
    try:
        case = case_in(folder)
        case.values |= {
            "model": {"source": str(MODELS / "chain-a"), "dtype": "float32"},
            "engine": {"backend": "transformers"},
        }
        case.values["hardware"] |= {"tier": "L4"}
        case.write()
        run_id = case.start(lab)
        wait_for(other.running, "the pod runs on the node with an L4", START_S)
        assert not node.running()
        case.wait_until_published(lab, run_id, timeout_s=END_S)
    finally:
        other.stop()
        plane.call("DELETE", "/api/v1/nodes/node-l4")


def test_a_node_that_vanishes_is_noticed_and_its_replica_replaced(
    lab: PrefectLab, plane: ControlPlane, node: FakeKubelet, folder: Path
) -> None:
    spot = FakeKubelet(plane, name="node-spot", gpus=8, product="NVIDIA-H100-80GB-HBM3")
    plane.call("PATCH", "/api/v1/nodes/node-h100", {"spec": {"unschedulable": True}}, MERGE)
    spot.start()
    try:
        case = case_in(folder)
        run_id = case.start(lab)
        one_at_work(case, spot)
    finally:
        plane.call("PATCH", "/api/v1/nodes/node-h100", {"spec": {"unschedulable": None}}, MERGE)
        spot.stop()  # power off: its processes are gone, and nobody reports it
    assert case.num_commits() < NUM_SHARDS
    case.wait_until_published(lab, run_id, timeout_s=END_S)
    found = replicas(lab, run_id)
    (lost,) = (run for run in found if run["state_type"] == "CRASHED")
    assert "no heartbeat" in lost["state"]["message"]
