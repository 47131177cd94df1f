"""`nightjar` commands as forks of one warm process: real processes to kill, without their start-up time.

The server (`python -m tests.faults.forked`) has imported everything and does nothing itself, so that
forking it is safe; each child becomes one `nightjar` command with a failpoint of its own.

    with Forks(folder) as forks:
        child = forks.start(["run", "job.yaml"], failpoint="after_data:kill:1:7")
        child.wait()
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.processes import REPOSITORY
from tests.seaweed import ACCESS_KEY, SECRET_KEY

_POLL_S = 0.01
_AWS = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Child:
    """One forked command."""

    pid: int
    log: Path
    """What it said, on both outputs."""

    status: int | None = None
    """As `Popen.returncode`: -9 after a SIGKILL."""

    is_over: threading.Event = field(default_factory=threading.Event)

    def poll(self) -> int | None:
        return self.status

    def wait(self, timeout_s: float = 60.0) -> int:
        if not self.is_over.wait(timeout_s):
            raise TimeoutError(f"{self.log}: not over after {timeout_s:g} s")
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        """SIGKILL, unless it has ended by itself."""
        if self.status is None:
            with suppress(ProcessLookupError):  # reaped, and not told yet
                os.kill(self.pid, signal.SIGKILL)

    def said(self) -> str:
        """Its last line."""
        lines = self.said_whole().splitlines()
        return lines[-1][:300] if lines else ""

    def said_whole(self) -> str:
        return self.log.read_text(errors="replace").strip()


class Forks:
    """The server and its living children, all ended by `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: dict[int, Child] = {}
        self._lock = threading.Lock()
        self._num_started = 0
        self._started: dict[int, Child] = {}
        self._has_started = threading.Condition(self._lock)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, **_AWS, "NIGHTJAR_WORK_DIR": str(folder / "work")},
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, argv: list[str], **options: Any) -> Child:
        """Fork one command.

        Args:
            argv: As after `nightjar`, or `["commit-worker", ...]`.
            options: `failpoint`, as in NIGHTJAR_FAILPOINT; `skew_s`, how wrong its clock is; `moody`:
                a dummy engine that fails some rows; `env`.
        """
        with self._has_started:
            self._num_started += 1
            number = self._num_started
            log = self._folder / f"child-{number:05d}.log"
            order = {"number": number, "argv": argv, "log": str(log), **options}
            assert self._server.stdin is not None
            self._server.stdin.write(json.dumps(order) + "\n")
            self._server.stdin.flush()
            if not self._has_started.wait_for(lambda: number in self._started, timeout=60):
                raise TimeoutError("the fork server does not answer")
            return self._started.pop(number)

    def call(self, argv: list[str], **options: Any) -> Child:
        """Run one command to its end."""
        child = self.start(argv, **options)
        child.wait(120)
        return child

    def close(self) -> None:
        for child in list(self._children.values()):
            child.kill()
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        self._reader.join()
        assert self._server.stdout is not None
        self._server.stdout.close()

    def _read(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            told = json.loads(line)
            with self._has_started:
                if "log" in told:
                    child = Child(told["pid"], Path(told["log"]))
                    self._children[child.pid] = self._started[told["number"]] = child
                    self._has_started.notify_all()
                    continue
                child = self._children.pop(told["pid"])
            child.status = told["status"]
            child.is_over.set()


# ---- the server's side


def serve() -> None:
    from functools import cache

    from botocore import loaders

    import flows.cli
    import flows.commands
    import storage.s3_store
    import tasks.drain
    import tasks.orchestrate
    import tasks.verify
    import tests.faults.commit_worker

    # Every S3 client reads a megabyte of JSON; read once, it is there in every fork.
    load = cache(loaders.JSONFileLoader().load_file)
    loaders.JSONFileLoader.load_file = lambda _, path: load(path)  # type: ignore[method-assign]
    storage.s3_store.make_client().close()
    warm = (flows.cli, flows.commands, storage.s3_store, tasks.drain, tasks.orchestrate)
    assert all((*warm, tasks.verify, tests.faults.commit_worker))
    living: set[int] = set()
    is_open, rest = True, b""
    while is_open or living:
        readable = select.select([0] if is_open else [], [], [], _POLL_S)[0]
        if readable:
            data = os.read(0, 1 << 16)
            is_open = bool(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    become(order)
                living.add(pid)
                tell({"number": order["number"], "pid": pid, "log": order["log"]})
            for pid in () if is_open else living:
                os.kill(pid, signal.SIGKILL)  # whoever asked for them is gone
        while living:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            living.discard(pid)
            tell({"pid": pid, "status": os.waitstatus_to_exitcode(status)})


def tell(what: dict[str, Any]) -> None:
    os.write(1, (json.dumps(what) + "\n").encode())


def become(order: dict[str, Any]) -> None:
    """Be that command, in a child; never returns."""
    code = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = run(order)
    except BaseException:
        # A fork must not go on as its server, whatever happens to it.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(order: dict[str, Any]) -> int:
    from flows import cli
    from storage import probe
    from storage.clock import SystemClock
    from storage.failpoints import VARIABLE
    from tasks import drain
    from tests.faults import commit_worker

    os.environ[VARIABLE] = order.get("failpoint", "")
    os.environ.update(order.get("env", {}))
    probe._RACE_BYTES = 1 << 16  # type: ignore[misc]
    skew_s = float(order.get("skew_s", 0.0))
    if skew_s:
        SystemClock.now = lambda self: time.time() + skew_s  # type: ignore[method-assign]
    if order.get("moody"):
        from tests.faults.moody_engine import MoodyBackend

        drain.drain.__kwdefaults__["build_backend"] = MoodyBackend
    name, *arguments = order["argv"]
    if name == "commit-worker":
        commit_worker.main(*arguments)
        return 0
    return cli.main([name, *arguments])


if __name__ == "__main__":
    serve()
