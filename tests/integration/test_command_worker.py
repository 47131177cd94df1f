"""The `command` worker: what it starts is stopped as a whole, and what it does not know is refused."""

import asyncio
import os
import shlex
import signal
import socket
import sys
import time
import tomllib
import uuid
from pathlib import Path

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import InfrastructureNotAvailable, InfrastructureNotFound

from flows.command_worker import CommandConfiguration, CommandWorker
from tasks.job_variables import ProvisionError

# Starts a grandchild, writes both ids to a file, and sleeps; SIGTERM reaches each on its own.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".new", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""
# Never ends by SIGTERM.
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + FAMILY


def configuration(command, **kwargs):
    return CommandConfiguration(
        command=shlex.join(command), grace_s=kwargs.pop("grace_s", 5), **kwargs
    )


def worker():
    return CommandWorker(work_pool_name="launcher")


def flow_run():
    return FlowRun(flow_id=uuid.uuid4(), name="replica-0", parameters={})


def run(config):
    return asyncio.run(worker().run(flow_run(), config))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def read_ids(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, "the command never started"
        await asyncio.sleep(0.02)
    return [int(word) for word in path.read_text().split()]


def test_the_exit_code_of_the_command_is_the_result():
    ended = run(configuration([sys.executable, "-c", "raise SystemExit(7)"]))
    assert ended.status_code == 7
    assert ended.identifier.startswith(f"{socket.gethostname()}:")


@pytest.mark.parametrize("send_env", ["inherit", "stdin"])
def test_the_command_sees_its_environment_and_its_folder(tmp_path, send_env):
    code = "import os, pathlib; pathlib.Path('seen').write_text(os.environ['SECRET'])"
    config = configuration(
        [sys.executable, "-c", code],
        env={"SECRET": "it's $HOME\nand more"},
        working_dir=str(tmp_path),
        send_env=send_env,
    )
    assert run(config).status_code == 0
    assert (tmp_path / "seen").read_text() == "it's $HOME\nand more"


def test_the_launcher_stands_before_the_command(tmp_path):
    seen = tmp_path / "seen"
    config = configuration(["touch", str(seen)], launcher="env A=b nice -n 1")
    assert config.argv()[:5] == ["env", "A=b", "nice", "-n", "1"]
    assert run(config).status_code == 0
    assert seen.exists()


def test_secrets_sent_by_standard_input_are_in_no_process_list():
    config = configuration(
        ["true"], env={"TOKEN": "hunter2"}, send_env="stdin", launcher="ssh gpu1"
    )
    assert config.argv() == ["ssh", "gpu1", "sh", "-s"]
    assert b"export TOKEN=hunter2" in config.script()


@pytest.mark.parametrize("send_env", ["inherit", "stdin"])
@pytest.mark.parametrize("code", [FAMILY, STUBBORN], ids=["willing", "stubborn"])
def test_a_stopped_worker_leaves_no_process_of_a_flow_run(tmp_path, code, send_env):
    ids = tmp_path / "ids"
    config = configuration([sys.executable, "-c", code, str(ids)], grace_s=1, send_env=send_env)

    async def start_and_cancel():
        running = asyncio.create_task(worker().run(flow_run(), config))
        pids = await read_ids(ids)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return pids

    pids = asyncio.run(start_and_cancel())
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def test_a_grandchild_that_outlives_its_flow_run_is_stopped(tmp_path):
    ids = tmp_path / "ids"
    code = FAMILY.rsplit("time.sleep", 1)[0]
    assert run(configuration([sys.executable, "-c", code, str(ids)])).status_code == 0
    assert not any(is_running(int(pid)) for pid in ids.read_text().split())


def test_a_cut_line_stops_the_remote_side(tmp_path):
    ids = tmp_path / "ids"
    # setsid stands for a remote host: killing the launcher's group does not reach what it started.
    config = configuration(
        [sys.executable, "-c", FAMILY, str(ids)],
        send_env="stdin",
        launcher="setsid --wait",
        grace_s=1,
    )

    async def start_and_cut():
        started = asyncio.get_running_loop().create_future()

        class Status:
            def started(self, value):
                started.set_result(value)

        running = asyncio.create_task(worker().run(flow_run(), config, Status()))
        pids = await read_ids(ids)
        os.killpg(int((await started).rpartition(":")[2]), signal.SIGKILL)
        ended = await running
        return pids, ended

    pids, ended = asyncio.run(start_and_cut())
    assert ended.status_code == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def test_cancelling_a_run_kills_its_group_and_twice_is_not_found(tmp_path):
    ids = tmp_path / "ids"
    config = configuration([sys.executable, "-c", FAMILY, str(ids)])

    async def start_and_kill():
        one = worker()
        running = asyncio.create_task(one.run(flow_run(), config))
        pids = await read_ids(ids)
        await one.kill_infrastructure(f"{socket.gethostname()}:{pids[0]}", config, grace_seconds=5)
        ended = await running
        with pytest.raises(InfrastructureNotFound):
            await one.kill_infrastructure(ended.identifier, config)
        return pids, ended

    pids, ended = asyncio.run(start_and_kill())
    assert ended.status_code == -signal.SIGTERM
    assert not any(is_running(pid) for pid in pids)


def test_a_run_on_another_host_cannot_be_killed_from_here():
    with pytest.raises(InfrastructureNotAvailable, match="was started on elsewhere"):
        asyncio.run(worker().kill_infrastructure("elsewhere:1", configuration(["true"])))


def resolve(values):
    template = CommandWorker.get_default_base_job_template()
    return asyncio.run(
        CommandConfiguration.from_template_and_values(base_job_template=template, values=values)
    )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"launchr": "ssh gpu1"}, "'launchr' .* did you mean launcher"),
        ({"gpu_count": "four"}, "gpu_count is 'four'"),
        ({"envv.A": "b"}, "'envv' .* did you mean env"),
    ],
)
def test_a_variable_that_would_be_dropped_is_refused(values, named):
    with pytest.raises(ProvisionError, match=named):
        resolve(values)


def test_the_worker_type_is_announced_to_prefect():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["prefect.collections"] == {"nightjar": "flows.command_worker"}
    assert CommandWorker.get_worker_class_from_type("command") is CommandWorker
    declared = CommandWorker.get_default_base_job_template()["variables"]["properties"]
    assert {"launcher", "send_env", "gpu_count", "working_dir", "grace_s"} <= set(declared)
