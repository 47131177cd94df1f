"""A Prefect worker type, `command`: starts a flow run through any launcher, such as srun or ssh.

    prefect worker start --pool gpu-slurm --type command

The pool's variables say how: `launcher` is put before the flow run's command, and `send_env` says how
the environment gets there. A flow run is one process group; it is stopped as a whole when the run is
cancelled, when the worker stops, and when its main process ends.
"""

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.abc
from prefect.client.orchestration import PrefectClient
from prefect.exceptions import InfrastructureNotAvailable, InfrastructureNotFound
from prefect.workers.base import (
    BaseJobConfiguration,
    BaseVariables,
    BaseWorker,
    BaseWorkerResult,
)
from pydantic import Field

from tasks.job_variables import check_job_variables

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

# Sent to the remote shell. Its standard input stays open for as long as the flow run may live: when
# the line or the worker is gone, `cat` ends, and the remote group is stopped. Both children lead
# sessions of their own, so that a signal to this shell alone cannot part them.
_REMOTE_SCRIPT = """{{
exec 3<&0
{exports}
{cd}setsid sh -c {command} </dev/null 3<&- &
child=$!
setsid sh -c 'cat <&3 >/dev/null; kill -TERM "-$0"; sleep {grace_s}; kill -KILL "-$0"' "$child" 2>/dev/null &
watch=$!
wait "$child"; code=$?
kill -TERM "-$watch" "-$child" 2>/dev/null
exit "$code"
}}
"""


class CommandVariables(BaseVariables):
    """What a deployment or flow run may set."""

    launcher: str = Field(
        default="",
        description="Put before the command: `srun --gres=gpu:4`, `ssh gpu1`; empty runs it here.",
    )
    send_env: Literal["inherit", "stdin"] = Field(
        default="inherit",
        description="inherit: the launcher forwards its environment, as srun does. "
        "stdin: the launcher starts `sh -s`, as ssh does, and gets variables and command on "
        "standard input, where no process list shows them.",
    )
    gpu_count: int = Field(default=1, ge=0, description="GPUs the launcher was asked for.")
    working_dir: str | None = Field(default=None, description="Folder to run in.")
    grace_s: int = Field(default=60, ge=1, description="Seconds between SIGTERM and SIGKILL.")


class CommandConfiguration(BaseJobConfiguration):
    """The resolved variables of one flow run; a variable the pool does not know is an error."""

    launcher: str = Field(default="")
    send_env: Literal["inherit", "stdin"] = Field(default="inherit")
    gpu_count: int = Field(default=1)
    working_dir: str | None = Field(default=None)
    grace_s: int = Field(default=60)

    @classmethod
    async def from_template_and_values(
        cls,
        base_job_template: dict[str, Any],
        values: dict[str, Any],
        client: PrefectClient | None = None,
    ) -> "CommandConfiguration":
        """Refuse what Prefect would drop, then resolve as Prefect does.

        Raises:
            ProvisionError: a variable is unknown or of the wrong type; Prefect crashes the run with it.
        """
        # `env.NAME` sets one key of a known variable.
        whole = {name: value for name, value in values.items() if "." not in name}
        nested: dict[str, Any] = {name.split(".")[0]: {} for name in values if "." in name}
        check_job_variables({**nested, **whole}, base_job_template)
        resolved: CommandConfiguration = await super().from_template_and_values(
            base_job_template=base_job_template, values=values, client=client
        )
        return resolved

    def argv(self) -> list[str]:
        """The process to start on this host."""
        launcher = shlex.split(self.launcher)
        if self.send_env == "stdin":
            return [*launcher, "sh", "-s"]
        return [*launcher, *shlex.split(self.command or "")]

    def script(self) -> bytes:
        """What goes to standard input when `send_env` is stdin."""
        exports = [
            f"export {name}={shlex.quote(value)}"
            for name, value in sorted(self.env.items())
            if value is not None and name.isidentifier()
        ]
        return _REMOTE_SCRIPT.format(
            exports="\n".join(exports),
            cd=f"cd {shlex.quote(self.working_dir)} || exit 126\n" if self.working_dir else "",
            command=shlex.quote(f"exec {self.command}"),
            grace_s=self.grace_s,
        ).encode()


class CommandResult(BaseWorkerResult):
    """How the launcher ended."""


class CommandWorker(BaseWorker[CommandConfiguration, CommandVariables, CommandResult]):
    """Runs each flow run as one process group behind a launcher."""

    type = "command"
    job_configuration = CommandConfiguration
    job_configuration_variables = CommandVariables
    _display_name = "Command"
    _description = "Start flow runs through a launcher such as srun or ssh."

    async def run(
        self,
        flow_run: "FlowRun",
        configuration: CommandConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> CommandResult:
        """Start the launcher and wait for it; nothing of its group outlives this call."""
        by_stdin = configuration.send_env == "stdin"
        process = await asyncio.create_subprocess_exec(
            *configuration.argv(),
            env=dict(os.environ) if by_stdin else _environment(configuration),
            cwd=None if by_stdin else configuration.working_dir,
            stdin=asyncio.subprocess.PIPE if by_stdin else asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        identifier = f"{socket.gethostname()}:{process.pid}"
        try:
            if by_stdin:
                await _send(process, configuration.script())
            if task_status is not None:
                task_status.started(identifier)
            status_code = await process.wait()
        finally:
            # Also when this task is cancelled: without a shield the first await would end it.
            with anyio.CancelScope(shield=True):
                await _stop_group(process.pid, process, configuration.grace_s)
        return CommandResult(identifier=identifier, status_code=status_code)

    async def kill_infrastructure(
        self,
        infrastructure_pid: str,
        configuration: CommandConfiguration,
        grace_seconds: int = 30,
    ) -> None:
        """Stop a flow run's process group: SIGTERM, then SIGKILL after `grace_seconds`.

        Raises:
            InfrastructureNotFound: the group has ended already.
            InfrastructureNotAvailable: it runs on another host.
        """
        host, _, pid = infrastructure_pid.rpartition(":")
        if host != socket.gethostname():
            raise InfrastructureNotAvailable(
                f"{infrastructure_pid} was started on {host}; this worker runs on {socket.gethostname()}"
            )
        if not _group_lives(int(pid)):
            raise InfrastructureNotFound(f"process group {pid} has ended already")
        await _stop_group(int(pid), None, grace_seconds)


def _environment(configuration: CommandConfiguration) -> dict[str, str]:
    """The worker's environment with the run's; `prefect` is the worker's own, activated or not."""
    given = {name: value for name, value in configuration.env.items() if value is not None}
    path = given.get("PATH") or os.environ.get("PATH", os.defpath)
    own = str(Path(sys.executable).parent)
    return {**os.environ, **given, "PATH": os.pathsep.join((own, path))}


async def _send(process: asyncio.subprocess.Process, script: bytes) -> None:
    if process.stdin is None:
        raise RuntimeError("the launcher was started without a standard input")
    process.stdin.write(script)
    # A launcher that ends at once is reported by its exit code, not by the broken pipe.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await process.stdin.drain()


async def _stop_group(
    group: int, process: asyncio.subprocess.Process | None, grace_s: float
) -> None:
    """End every process of the group; returns when none is left."""
    if process is not None and process.stdin is not None:
        process.stdin.close()
    for stop, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        if not _group_lives(group):
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, stop)
        with anyio.move_on_after(patience_s):
            while _group_lives(group):
                await anyio.sleep(0.05)
    if process is not None:
        await process.wait()


def _group_lives(group: int) -> bool:
    """Whether any process of the group still runs; one that only waits to be reaped does not."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    processes = list(Path("/proc").glob("[0-9]*/stat"))
    return not processes or any(_is_running_member(path, group) for path in processes)


def _is_running_member(stat: Path, group: int) -> bool:
    try:
        # pid (name) state parent group ...; a name may hold spaces and brackets
        state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return False
    return int(process_group) == group and state not in ("Z", "X")
