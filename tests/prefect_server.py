"""A real Prefect server and real process workers for tests: SQLite, loopback, a home of their own.

Everything is started in a session of its own and ended by its process id; workers get SIGINT's default
back, without which SIGTERM never stops them.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, TypeVar

from tests.ports import free_port

ROOT = Path(__file__).parents[1]
POOL = "nightjar"
PREFECT = [sys.executable, "-m", "prefect"]
# Prefect finds the worker type `command` by the installed package; a bare checkout has none.
_KNOWING_OUR_WORKER = [
    sys.executable,
    "-c",
    "import flows.command_worker, runpy; runpy.run_module('prefect', run_name='__main__')",
]
_START_S = 120.0
_PATIENCE_S = 20.0

T = TypeVar("T")


@dataclass
class PrefectLab:
    """A running server, and what a test does with it."""

    folder: Path
    port: int
    server: subprocess.Popen[bytes] | None = None
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def env(self) -> dict[str, str]:
        """For every process that talks to this server."""
        settings = {
            "PREFECT_HOME": str(self.folder / "home"),
            "PREFECT_API_URL": self.api_url,
            "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_ENABLED": "false",
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_CLI_PROMPT": "false",
            "PREFECT_CLI_COLORS": "false",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "NIGHTJAR_WAVE_POLL_S": "1",
            "DO_NOT_TRACK": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**inherited, **settings, "PATH": path}

    def start_server(self) -> None:
        self.server = self._start([*PREFECT, "server", "start"], "server.log")
        wait_for(self._is_up, "the server answers", _START_S, process=self.server)

    def stop_server(self) -> None:
        """SIGKILL: what is on disk is all that is left."""
        assert self.server is not None
        end(self.server, signal.SIGKILL)
        self.server = None

    def deploy(self, *options: str) -> dict[str, Any]:
        """Run `nightjar deploy` for every provider; return what it says is there."""
        providers = [f"--provider={kind}" for kind in ("process", "kubernetes", "ecs", "command")]
        command = [sys.executable, "-m", "flows.cli", "deploy", "--json", *providers, *options]
        done = self.call(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def start_worker(
        self, pool: str = POOL, *, kind: str = "process", limit: int = 4, **env: str
    ) -> subprocess.Popen[bytes]:
        program = PREFECT if _is_installed() else _KNOWING_OUR_WORKER
        command = ["env", "--default-signal=INT", *program, "worker", "start"]
        command += ["--pool", pool, "--type", kind, "--limit", str(limit)]
        worker = self._start(command, f"worker-{pool}.log", env)
        self.workers.append(worker)
        return worker

    def stop_worker(self, worker: subprocess.Popen[bytes], signum: int = signal.SIGTERM) -> None:
        end(worker, signum)
        self.workers.remove(worker)

    def call(
        self, *command: str, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**self.env, **(env or {})},
            capture_output=True,
            text=True,
            timeout=400,
        )

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """POST to the server and return its JSON; GET without a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.api_url}{path}", data, {"Content-Type": "application/json"}
        )
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as reply:
                    text = reply.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                # A loaded SQLite is locked now and then; the server says so with 503.
                if error.code != 503 or time.monotonic() > until:
                    raise
                time.sleep(0.5)

    def run_deployment(self, name: str, parameters: dict[str, Any], **more: Any) -> str:
        """Start a flow run and return its id."""
        flow, deployment = name.split("/")
        found = self.api(f"/deployments/name/{flow}/{deployment}")
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}, **more}
        return str(self.api(f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def cancel(self, run_id: str) -> None:
        """As `prefect flow-run cancel` does."""
        body = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        assert self.api(f"/flow_runs/{run_id}/set_state", body)["status"] == "ACCEPT"

    def flow_run(self, run_id: str) -> dict[str, Any]:
        return dict(self.api(f"/flow_runs/{run_id}"))

    def wait_for_state(self, run_id: str, *states: str, timeout_s: float = 60) -> dict[str, Any]:
        """Wait until a flow run is in one of the states, by type; return the flow run."""
        wanted = states or ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

        def reached() -> dict[str, Any] | None:
            found = self.flow_run(run_id)
            return found if found["state_type"] in wanted else None

        return wait_for(reached, f"flow run {run_id} is {' or '.join(wanted)}", timeout_s)

    def task_runs(self, run_id: str) -> list[dict[str, Any]]:
        where = {"flow_runs": {"id": {"any_": [run_id]}}}
        return list(self.api("/task_runs/filter", where))

    def everything_stored(self) -> bytes:
        """The server's database, results and settings, and all logs, as bytes."""
        with sqlite3.connect(self.folder / "home" / "prefect.db") as database:
            database.execute("PRAGMA wal_checkpoint(FULL)")
        database.close()
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return b"\n".join(path.read_bytes() for path in files)

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def stop(self) -> None:
        for worker in list(self.workers):
            family = children_of(worker.pid)  # a killed worker's flow runs may go on
            self.stop_worker(worker, signal.SIGKILL)
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.server is not None:
            self.stop_server()

    def _start(
        self, command: list[str], log: str, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env={**self.env, **(env or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _is_up(self) -> bool:
        try:
            self.api("/health")
        except (urllib.error.URLError, OSError):
            return False
        return True


@contextmanager
def running_prefect(folder: Path) -> Iterator[PrefectLab]:
    """Start a server with Nightjar's pool and deployments; stop all that was started."""
    lab = PrefectLab(folder, free_port())
    (folder / "home").mkdir()
    try:
        lab.start_server()
        lab.deploy()
        yield lab
    finally:
        lab.stop()


def wait_for(
    check: Callable[[], T],
    what: str,
    timeout_s: float,
    process: subprocess.Popen[bytes] | None = None,
) -> T:
    """Ask until the answer is true; fail naming what was waited for."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = check()
        if answer:
            return answer
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise AssertionError(f"waited {timeout_s:.0f} s in vain: {what}")
        time.sleep(0.1)


def end(process: subprocess.Popen[bytes], signum: int) -> None:
    """Signal one process of ours and wait for it."""
    if process.poll() is None:
        process.send_signal(signum)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def children_of(parent: int) -> set[int]:
    """Processes that one has started and that still run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.add(int(stat.parent.name))
    return found


def _is_installed() -> bool:
    try:
        return bool(distribution("nightjar").entry_points.select(group="prefect.collections"))
    except PackageNotFoundError:
        return False
