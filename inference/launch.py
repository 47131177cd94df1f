"""Starting, watching and stopping the ranks of one replica on this host, one process a device.

A launcher (torchrun, or DeepSpeed's) starts `python -m MODULE` once a rank and stops all when one ends. On top
of that each rank holds a socket to whoever started it (`inference.rank_link`): it ends itself when that closes.
So nothing outlives the replica, whichever process is killed, and the replica learns of a dead rank at once.

    replica's process --starts--> launcher --starts--> rank 0, rank 1, ...
           \\_________________ a socket each ________________/
"""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from inference.config import DistributedConfig

MODEL_VARIABLE = "NIGHTJAR_MODEL"
"""Where ranks find the model's folder on their host, if it is not where the first rank has it."""

_STOP_GRACE_S = 5.0
_START_S = 60.0
_GONE_S, _GONE_POLL_S = 15.0, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start on this host."""

    module: str
    """Run as `python -m MODULE` by every rank."""

    args: Sequence[str] = ()
    num_ranks: int
    """On this host."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    host_rank: int = 0
    """This host's number among `distributed.num_hosts`; 0 holds the first ranks."""

    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's environment."""

    is_again: bool = False
    """Whether all hosts start anew: none has anything to stage, so they meet soon or not at all."""


def environment(distributed: DistributedConfig) -> dict[str, str]:
    """Turn the settings into what NCCL and gloo read from the environment."""
    env: dict[str, str] = {}
    if distributed.interface:
        # "=": this name exactly; without it NCCL takes it as a prefix
        env["NCCL_SOCKET_IFNAME"] = f"={distributed.interface}"
        env["GLOO_SOCKET_IFNAME"] = distributed.interface
    elif distributed.num_hosts == 1:
        env["GLOO_SOCKET_IFNAME"] = "lo"  # a host name that resolves to nothing must not matter
    if distributed.fabric == "tcp":
        env |= {"NCCL_IB_DISABLE": "1", "NCCL_NET": "Socket"}
    elif distributed.fabric in ("infiniband", "roce"):
        env |= {"NCCL_IB_DISABLE": "0", "NCCL_NET": "IB"}
    if distributed.fabric == "roce":
        env["NCCL_IB_ROCE_VERSION_NUM"] = "2"
    # A collective past its time ends the rank; it must not be left waiting on the device.
    env["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
    env["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] = str(max(60, int(2 * distributed.timeout_s)))
    return env


def command(launch: Launch) -> list[str]:
    """Return the launcher's command line."""
    if launch.distributed.launcher == "deepspeed":
        return _deepspeed_command(launch)
    return _torchrun_command(launch)


def _torchrun_command(launch: Launch) -> list[str]:
    distributed = launch.distributed
    options = [f"--nproc-per-node={launch.num_ranks}", "--max-restarts=0"]
    if distributed.num_hosts == 1:
        options += ["--standalone", "--local-addr=127.0.0.1"]
    else:
        host, _, port = distributed.rendezvous.rpartition(":")
        options += [f"--nnodes={distributed.num_hosts}", f"--node-rank={launch.host_rank}"]
        options += [f"--master-addr={host}", f"--master-port={port}"]
        if launch.is_again:
            options += [f"--rdzv-conf=timeout={int(distributed.timeout_s + _START_S)}"]
    return [
        *(sys.executable, "-m", "torch.distributed.run", *options),
        *("-m", launch.module, *launch.args),
    ]


def _deepspeed_command(launch: Launch) -> list[str]:
    distributed = launch.distributed
    hosts = [f"host-{rank}" for rank in range(distributed.num_hosts)]
    host, port = "127.0.0.1", str(_free_port())
    if distributed.num_hosts > 1:
        host, _, port = distributed.rendezvous.rpartition(":")
    world = {name: _devices(launch.num_ranks) for name in hosts}
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch"),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
        *(f"--node_rank={launch.host_rank}", f"--master_addr={host}", f"--master_port={port}"),
        *("--no_local_rank", "--module", launch.module, *launch.args),
    ]


def _devices(count: int) -> list[str]:
    """Names of the devices that DeepSpeed's launcher gives its ranks: it replaces CUDA_VISIBLE_DEVICES."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (visible or [str(index) for index in range(count)])[:count]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_gone(rendezvous: str) -> None:
    """Wait, for seconds, until no first host's launcher answers any more at `host:port`.

    One that is still ending would take in those that start anew, and take them with it.
    """
    host, _, port = rendezvous.rpartition(":")
    deadline = time.monotonic() + _GONE_S
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            socket.create_connection((host, int(port)), timeout=1.0).close()
            time.sleep(_GONE_POLL_S)


class RankProcesses:
    """A started launcher."""

    def __init__(self, launch: Launch, output: IO[bytes] | int = subprocess.DEVNULL) -> None:
        """Start it; what launcher and ranks print goes to `output`."""
        root = str(Path(__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command(launch),
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                **environment(launch.distributed),
                **launch.env,
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a Ctrl-C reaches the replica's process, which stops its ranks
        )

    @property
    def pid(self) -> int:
        """The launcher's process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the launcher's exit code, None while it runs: 0 only if every rank finished."""
        return self._process.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for all to end. Raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout_s)

    def stop(self, grace_s: float = _STOP_GRACE_S) -> None:
        """End the launcher, which ends its ranks. Safe to repeat."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
