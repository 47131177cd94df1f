"""A node without a machine: it takes pods that the scheduler gives it and runs each as a local process.

Its GPUs are a number in its status. Images, volumes, users and limits are not looked at; the command
goes through our image's own entrypoint. What it reports back is what a kubelet reports.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.cluster.control_plane import ApiError, ControlPlane
from tests.processes import children

ROOT = Path(__file__).parents[2]
_POLL_S = 0.3
_HEARTBEAT_S = 8.0
_STRATEGIC = "application/strategic-merge-patch+json"
_MERGE = "application/merge-patch+json"

Pod = dict[str, Any]


class FakeKubelet:
    """One node; every pod on it is a process group of its own."""

    def __init__(self, plane: ControlPlane, *, name: str, gpus: int, product: str) -> None:
        self.plane, self.name, self.gpus, self.product = plane, name, gpus, product
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        """By pod name; those that have ended are kept."""
        self.most_gpus = 0
        """Of pods that ran at once."""
        self._evicted: set[str] = set()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._heartbeats, name=f"{name}-heartbeats"),
            threading.Thread(target=self._watch, name=f"{name}-pods"),
        ]
        self._programs = plane.folder / "programs"

    def start(self) -> None:
        make_programs(self._programs)
        labels = {"nvidia.com/gpu.product": self.product, "kubernetes.io/hostname": self.name}
        taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": labels},
            "spec": {"taints": [taint]},
        }
        self.plane.call("POST", "/api/v1/nodes", node)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Power off: nothing more is reported, and every process is gone."""
        self._closed.set()
        for thread in self._threads:
            thread.join()
        for process in self.running().values():
            process.send_signal(signal.SIGSTOP)
            for pid in (*children(process.pid, ""), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    def running(self) -> dict[str, subprocess.Popen[bytes]]:
        """The pods whose process lives."""
        return {name: p for name, p in self.processes.items() if p.poll() is None}

    def kill_for_memory(self, pod: str) -> None:
        """As the kernel does when a container outgrows its limit."""
        _kill_group(self.processes[pod], signal.SIGKILL)

    def _heartbeats(self) -> None:
        capacity = {
            "cpu": "192",
            "memory": "2Ti",
            "pods": "110",
            "ephemeral-storage": "10Ti",
            "nvidia.com/gpu": str(self.gpus),
        }
        while True:
            ready = {
                "type": "Ready",
                "status": "True",
                "reason": "KubeletReady",
                "lastHeartbeatTime": _now(),
                "lastTransitionTime": _now(),
            }
            status = {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}
            with contextlib.suppress(ApiError, OSError):
                path = f"/api/v1/nodes/{self.name}/status"
                self.plane.call("PATCH", path, {"status": status}, _STRATEGIC)
            if self._closed.wait(_HEARTBEAT_S):
                return

    def _watch(self) -> None:
        path = f"/api/v1/pods?fieldSelector=spec.nodeName={self.name}"
        while not self._closed.wait(_POLL_S):
            with contextlib.suppress(ApiError, OSError):
                pods = self.plane.call("GET", path)["items"]
                self._count_gpus(pods)
                for pod in pods:
                    self._look_at(pod)

    def _look_at(self, pod: Pod) -> None:
        name = pod["metadata"]["name"]
        if pod["metadata"].get("deletionTimestamp"):
            if name not in self._evicted:
                self._evicted.add(name)
                threading.Thread(target=self._remove, args=(pod,), daemon=True).start()
        elif name not in self.processes:
            self._start_pod(pod)

    def _count_gpus(self, pods: list[Pod]) -> None:
        live = [pod for pod in pods if pod["metadata"]["name"] in self.running()]
        limits = [pod["spec"]["containers"][0]["resources"]["limits"] for pod in live]
        self.most_gpus = max(self.most_gpus, sum(int(x["nvidia.com/gpu"]) for x in limits))

    def _start_pod(self, pod: Pod) -> None:
        (container,) = pod["spec"]["containers"]
        name = pod["metadata"]["name"]
        with (self.plane.folder / f"pod-{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [ROOT / "deployments" / "entrypoint.sh", *container["args"]],
                cwd=self.plane.folder,
                env=self._environment(pod, container),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        started = _now()
        self._report(pod, "Running", {"running": {"startedAt": started}}, is_ready=True)
        threading.Thread(target=self._wait_for, args=(pod, process, started), daemon=True).start()

    def _environment(self, pod: Pod, container: dict[str, Any]) -> dict[str, str]:
        env = image_env(self._programs, self.plane.folder)
        for entry in container.get("env", []):
            value = str(entry.get("value", ""))
            if "valueFrom" in entry:
                field = entry["valueFrom"]["fieldRef"]["fieldPath"]
                label = re.fullmatch(r"metadata\.labels\['(.+)'\]", field)
                value = pod["metadata"]["labels"].get(label[1], "") if label else ""
            env[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda m: env.get(m[1], m[0]), value)
        return env

    def _wait_for(self, pod: Pod, process: "subprocess.Popen[bytes]", started: str) -> None:
        code = process.wait()
        if self._closed.is_set():
            return
        exit_code = code if code >= 0 else 128 - code
        is_evicted = pod["metadata"]["name"] in self._evicted
        reason = "Completed" if code == 0 else "Error"
        if code == -signal.SIGKILL and not is_evicted:
            reason = "OOMKilled"
        ended = {
            "exitCode": exit_code,
            "reason": reason,
            "startedAt": started,
            "finishedAt": _now(),
        }
        phase = "Succeeded" if code == 0 else "Failed"
        self._report(pod, phase, {"terminated": ended}, is_ready=False)

    def _report(self, pod: Pod, phase: str, state: dict[str, Any], *, is_ready: bool) -> None:
        (container,) = pod["spec"]["containers"]
        seen = {
            "name": container["name"],
            "image": container["image"],
            "imageID": "",
            "restartCount": 0,
            "ready": is_ready,
            "state": state,
        }
        conditions = [{"type": "Ready", "status": str(is_ready)}]
        status = {
            "phase": phase,
            "startTime": _now(),
            "podIP": "127.0.0.1",
            "hostIP": "127.0.0.1",
            "containerStatuses": [seen],
            "conditions": conditions,
        }
        with contextlib.suppress(ApiError, OSError):
            self.plane.call("PATCH", f"{_path(pod)}/status", {"status": status}, _MERGE)

    def _remove(self, pod: Pod) -> None:
        """SIGTERM, the pod's grace, SIGKILL; then the object goes."""
        process = self.processes.get(pod["metadata"]["name"])
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(pod["metadata"].get("deletionGracePeriodSeconds", 30))
            except subprocess.TimeoutExpired:
                _kill_group(process, signal.SIGKILL)
            time.sleep(2 * _POLL_S)  # the end is reported first, as by a kubelet
        with contextlib.suppress(ApiError, OSError):
            self.plane.call("DELETE", _path(pod), {"gracePeriodSeconds": 0})


def make_programs(folder: Path) -> None:
    """What our image has on its PATH: `prefect`, by this interpreter."""
    folder.mkdir(exist_ok=True)
    shim = folder / "prefect"
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m prefect "$@"\n')
    shim.chmod(0o755)


def image_env(programs: Path, home: Path) -> dict[str, str]:
    """The environment that our image gives every container."""
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "HOME": str(home),
    }


def _path(pod: Pod) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _kill_group(process: "subprocess.Popen[bytes]", signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
