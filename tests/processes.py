"""Real `nightjar` processes: started, watched, killed, and what they leave behind read back."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from storage import keys
from storage.failpoints import VARIABLE
from storage.object_store import ObjectStore

REPOSITORY = Path(__file__).parents[1]
_POLL_S = 0.002


class Cli:
    """Starts `nightjar` commands as processes of their own and ends those that are left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def job(self, name: str, **settings: Any) -> Path:
        """Write a job file for the dummy engine; `settings` are dotted names with `__` for the dot."""
        job: dict[str, Any] = {
            "name": name,
            "model": {"source": "none"},
            "engine": {"backend": "dummy"},
            "output": {"uri": str(self.folder / "out")},
        }
        for dotted, value in settings.items():
            section, _, key = dotted.partition("__")
            if key:
                job.setdefault(section, {})[key] = value
            else:
                job[section] = value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(job, allow_unicode=True))
        return path

    def start(self, *args: str, failpoint: str = "", **env: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *args],
            env={
                **os.environ,
                VARIABLE: failpoint,
                "NIGHTJAR_WORK_DIR": str(self.folder / "work"),
                **env,
            },
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def call(self, *args: str, **options: str) -> "subprocess.CompletedProcess[str]":
        """Run one command to its end."""
        process = self.start(*args, **options)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@contextmanager
def cli_in(folder: Path) -> Iterator[Cli]:
    cli = Cli(folder)
    try:
        yield cli
    finally:
        cli.close()


def document(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    """Return what a command printed with `--json`."""
    assert done.stdout.strip(), f"exit {done.returncode}: {done.stderr}"
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def children(pid: int, what: str) -> list[int]:
    """Return the living processes below `pid` whose command line holds `what`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
            except OSError:
                continue
    return [child for child in parents if _is_below(child, pid, parents) and what in _line(child)]


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], *, timeout_s: float = 120.0, what: str = "") -> Any:
    """Return the condition's first true value."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what or condition}"
        time.sleep(_POLL_S)
    return found


def json_lines(module: str, *, triton_cache: Path, **env: str) -> list[Any]:
    """What a module of the tests prints, run in a process of its own, where Triton compiles and does not interpret."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=REPOSITORY,
        env={**inherited, **env, "TRITON_CACHE_DIR": str(triton_cache)},
        capture_output=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def kill(process: "subprocess.Popen[str]") -> bool:
    """SIGKILL a process; False if it had ended by itself."""
    was_alive = process.poll() is None
    process.kill()
    process.communicate()
    return was_alive and process.returncode == -signal.SIGKILL


def results(store: ObjectStore, folder: Path) -> pa.Table:
    """Return every output row a reader of `completions/` finds, without the attempt that made it."""
    tables = []
    for info in store.list(keys.COMPLETIONS):
        path = folder / "part.parquet"
        store.download(info.key, path)
        tables.append(pq.read_table(path))
    return pa.concat_tables(tables).drop_columns(["attempt"])


def holders(store: ObjectStore) -> list[str]:
    """Who holds a lease now."""
    leases = [info.key for info in store.list(keys.LEASES) if info.key != keys.LEASE_CLOCK]
    return [name for name in (json.loads(store.get(key))["holder"] for key in leases) if name]


def _is_below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == root:
            return True
    return False


def _line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
