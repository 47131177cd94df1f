"""A control plane, a node with eight GPUs, a Prefect server and its real Kubernetes worker."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.control_plane import ControlPlane, binaries, running_control_plane
from tests.cluster.fake_kubelet import FakeKubelet
from tests.prefect_server import PrefectLab, wait_for

NODE_GPUS = 8


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    programs = binaries()
    if programs is None:
        pytest.skip("NIGHTJAR_KUBERNETES names no folder with a control plane's binaries")
    if importlib.util.find_spec("prefect_kubernetes") is None:
        pytest.skip("needs the provision-test extra")
    with running_control_plane(tmp_path_factory.mktemp("kubernetes"), programs) as plane:
        yield plane


@pytest.fixture(scope="session")
def node(plane: ControlPlane) -> Iterator[FakeKubelet]:
    kubelet = FakeKubelet(plane, name="node-h100", gpus=NODE_GPUS, product="NVIDIA-H100-80GB-HBM3")
    kubelet.start()
    yield kubelet
    kubelet.stop()


@pytest.fixture(scope="session")
def lab(plane: ControlPlane, node: FakeKubelet, prefect_lab: PrefectLab) -> Iterator[PrefectLab]:
    prefect_lab.start_worker(
        "gpu-kubernetes", kind="kubernetes", limit=8, KUBECONFIG=str(plane.kubeconfig)
    )
    return prefect_lab


@pytest.fixture
def folder(tmp_path: Path, node: FakeKubelet) -> Iterator[Path]:
    """A folder of the test's own; nothing of an earlier test runs any more."""
    wait_for(lambda: not node.running(), "the pods of earlier tests have ended", 120)
    node.most_gpus = 0
    return tmp_path
