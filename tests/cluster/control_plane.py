"""A real Kubernetes control plane on loopback: etcd, API server, scheduler, controllers. No nodes.

The binaries come from the folder that `NIGHTJAR_KUBERNETES` names; `build_control_plane.sh` makes them.
Whatever the API server accepts or refuses, and wherever the scheduler puts a pod, is Kubernetes' own word.
"""

import json
import os
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARIES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
_TOKEN = "loopback"
_CONTROLLERS = "job,podgc,garbagecollector,namespace,nodelifecycle,serviceaccount"
_START_S = 180.0


class ApiError(Exception):
    """The API server refused; `code` is its HTTP status."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


def binaries() -> Path | None:
    """Where the binaries are; None when this machine has none."""
    folder = os.environ.get("NIGHTJAR_KUBERNETES")
    if folder is None or not all((Path(folder) / name).exists() for name in BINARIES):
        return None
    return Path(folder)


class ControlPlane:
    """A running control plane, and its API."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs = folder, programs
        self.port, self._etcd_port, self._peer_port = _free_ports(3)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._context = ssl._create_unverified_context()

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    def start(self) -> None:
        self._write_files()
        etcd = f"http://127.0.0.1:{self._etcd_port}"
        peer = f"http://127.0.0.1:{self._peer_port}"
        self._run(
            "etcd",
            *("--data-dir", str(self.folder / "etcd"), "--unsafe-no-fsync"),
            *("--listen-client-urls", etcd, "--advertise-client-urls", etcd),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"default={peer}"),
        )
        key = str(self.folder / "account.key")
        self._run(
            "kube-apiserver",
            *("--etcd-servers", etcd, "--secure-port", str(self.port)),
            *("--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1"),
            *("--cert-dir", str(self.folder / "certificates")),
            *("--token-auth-file", str(self.folder / "tokens.csv")),
            *("--authorization-mode", "AlwaysAllow"),
            *("--service-account-issuer", "https://loopback.local"),
            *("--service-account-signing-key-file", key, "--service-account-key-file", key),
            *("--service-cluster-ip-range", "10.0.0.0/24"),
            *("--disable-admission-plugins", "ServiceAccount"),
        )
        self._wait_until_ready()
        common = ("--kubeconfig", str(self.kubeconfig), "--leader-elect=false", "--port=0")
        self._run(
            "kube-controller-manager", *common, "--secure-port=0", "--controllers", _CONTROLLERS
        )
        self._run("kube-scheduler", *common, "--secure-port=0")

    def stop(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        """One request to the API server. Raises ApiError."""
        request = urllib.request.Request(
            f"https://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {_TOKEN}", "Content-Type": kind},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, context=self._context, timeout=30) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, error.read().decode(errors="replace")) from error

    def pods(self) -> list[dict[str, Any]]:
        return list(self.call("GET", "/api/v1/namespaces/default/pods")["items"])

    def jobs(self) -> list[dict[str, Any]]:
        return list(self.call("GET", "/apis/batch/v1/namespaces/default/jobs")["items"])

    def evict(self, name: str) -> None:
        """As draining a node does."""
        body = {"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": {"name": name}}
        self.call("POST", f"/api/v1/namespaces/default/pods/{name}/eviction", body)

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def _write_files(self) -> None:
        (self.folder / "tokens.csv").write_text(f"{_TOKEN},admin,admin,system:masters\n")
        subprocess.run(
            ["openssl", "genrsa", "-out", str(self.folder / "account.key"), "2048"],
            check=True,
            capture_output=True,
        )
        server = {"server": f"https://127.0.0.1:{self.port}", "insecure-skip-tls-verify": True}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "loopback", "cluster": server}],
            "users": [{"name": "admin", "user": {"token": _TOKEN}}],
            "contexts": [{"name": "loopback", "context": {"cluster": "loopback", "user": "admin"}}],
            "current-context": "loopback",
        }
        self.kubeconfig.write_text(json.dumps(config))

    def _run(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.log").open("wb") as log:
            process = subprocess.Popen(
                [self.programs / program, *arguments],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                self.call("GET", "/api/v1/namespaces/default")
                return
            except (ApiError, OSError) as error:
                if time.monotonic() > deadline:
                    raise AssertionError(f"no API server: {error}\n{self.logs()}") from error
            time.sleep(0.2)


@contextmanager
def running_control_plane(folder: Path, programs: Path) -> Iterator[ControlPlane]:
    plane = ControlPlane(folder, programs)
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
