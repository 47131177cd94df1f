"""One replica over two hosts: network namespaces joined by a cable, which is then cut.

Needs root and Debian's iproute2, to make namespaces; skipped without.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flows.config import load_job
from inference.backends.paged import PagedBackend
from inference.config import DistributedConfig, EngineConfig
from tasks.progress import Progress
from tasks.run import prepare
from tests.processes import REPOSITORY, children, is_alive, wait_for
from tests.ranked_owner import prompts

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: tensor parallel needs it")

MODEL = str(REPOSITORY / "tests" / "data" / "models" / "tiny-a")
CABLE = "fabric0"
TIMEOUT_S = 20.0
PATIENCE_S = 240.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Yield the names of two namespaces, 10.77.0.1 and 10.77.0.2, joined by a cable."""
    hosts = [f"nightjar-{os.getpid()}-{index}" for index in range(2)]
    made = []
    try:
        for host in hosts:
            ip("netns", "add", host)
            made.append(host)
        ip(
            "link",
            "add",
            CABLE,
            "netns",
            hosts[0],
            "type",
            "veth",
            "peer",
            CABLE,
            "netns",
            hosts[1],
        )
        for index, host in enumerate(hosts):
            ip("-n", host, "addr", "add", f"10.77.0.{index + 1}/24", "dev", CABLE)
            ip("-n", host, "link", "set", CABLE, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in made:
            ip("netns", "del", host)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 to make network namespaces")
    try:
        context = two_hosts()
        made = context.__enter__()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield made
    context.__exit__(None, None, None)


def start(host: str, *command: str, **env: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def config(**changes: Any) -> EngineConfig:
    return EngineConfig(model=MODEL, backend="paged", dtype="float32", **changes)


def planned(folder: Path, model: str) -> str:
    """Plan a small run whose replicas stage to a folder; return where it is."""
    (folder / "in.csv").write_text("prompt\none\ntwo\n")
    job = {
        "model": {"source": model},
        "input": {
            "uri": str(folder / "in.csv"),
            "prompt_column": "prompt",
            "chat_template": "none",
        },
        "output": {"uri": str(folder / "out")},
        "engine": {"backend": "paged"},
        "hardware": {"provider": "kubernetes", "stage_to": str(folder / "cache")},
    }
    (folder / "work").mkdir()
    run = prepare(load_job(job), work_dir=folder / "work", progress=Progress())
    run.close()
    return run.uri


def environment_of(run: str, folder: Path) -> dict[str, str]:
    """What the second pod of a replica of this run is given."""
    told = {"run_uri": run, "endpoint_url": None, "region": None, "profile": None}
    return {
        "NIGHTJAR_FOLLOW": json.dumps(told),
        "NIGHTJAR_NUM_HOSTS": "2",
        "NIGHTJAR_GPUS_PER_HOST": "1",
        "NIGHTJAR_LEADER": "10.77.0.1",
        "JOB_COMPLETION_INDEX": "1",
        "NIGHTJAR_CACHE": str(folder / "cache"),
    }


@contextmanager
def ended(*processes: "subprocess.Popen[str]") -> Iterator[None]:
    """End what is left of the hosts' processes, and print what they said."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
            print(out, err)


def tokens_of_one_host() -> dict[int, tuple[int, ...]]:
    alone = PagedBackend(config())
    alone.submit(prompts())
    found: dict[int, tuple[int, ...]] = {}
    while alone.num_unfinished:
        found.update({c.seq_id: c.token_ids for c in alone.step()})
    return found


@pytest.mark.slow
def test_two_hosts_give_the_tokens_of_one_and_a_cut_cable_ends_the_replica(hosts):
    expected = tokens_of_one_host()
    settings = DistributedConfig(
        num_hosts=2, rendezvous="10.77.0.1:29511", interface=CABLE, timeout_s=TIMEOUT_S
    )
    document = json.dumps(dataclasses.asdict(config(tensor_parallel_size=2, distributed=settings)))
    leader = start(hosts[0], sys.executable, "-m", "tests.ranked_owner", document)
    follower = start(
        hosts[1],
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--node-rank=1"),
        *("--nproc-per-node=1", "--master-addr=10.77.0.1", "--master-port=29511"),
        *("-m", "inference"),
        GLOO_SOCKET_IFNAME=CABLE,
    )
    assert leader.stdout is not None
    try:
        pids = json.loads(leader.stdout.readline())
        assert len(pids) == 2  # the launcher and this host's rank
        found = json.loads(leader.stdout.readline())
        assert [tuple(token_ids) for token_ids in found] == [expected[i] for i in range(8)]
        ranks = children(follower.pid, "-m inference")
        ip("-n", hosts[1], "link", "set", CABLE, "down")
        cut_at = time.monotonic()
        name, text = json.loads(leader.stdout.readline())
        assert name == "EngineFault"
        assert text.startswith("rank 0 (process ")
        assert text.endswith("all ranks were stopped")
        assert time.monotonic() - cut_at < 3 * TIMEOUT_S
        wait_for(
            lambda: not any(map(is_alive, [*pids, *ranks])),
            timeout_s=PATIENCE_S,
            what="the ranks of both hosts to end",
        )
    finally:
        for process in (leader, follower):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
            print(out, err)


@pytest.mark.slow
def test_a_second_host_stages_the_model_itself_and_gives_the_tokens_of_one(hosts, tmp_path):
    there = tmp_path / "first-host"
    shutil.copytree(MODEL, there)
    run = planned(tmp_path, MODEL)
    expected = tokens_of_one_host()
    settings = DistributedConfig(
        num_hosts=2, rendezvous="10.77.0.1:29500", interface=CABLE, timeout_s=TIMEOUT_S
    )
    asked = dataclasses.replace(
        config(tensor_parallel_size=2, distributed=settings), model=str(there)
    )
    leader = start(
        hosts[0], sys.executable, "-m", "tests.ranked_owner", json.dumps(dataclasses.asdict(asked))
    )
    # A namespace's commands have mounts of their own: the first host's folder is empty for the second.
    hidden = f"mount -t tmpfs none {there} && exec {sys.executable} -m tasks.follow"
    follower = start(
        hosts[1], "sh", "-c", hidden, **environment_of(run, tmp_path), GLOO_SOCKET_IFNAME=CABLE
    )
    assert leader.stdout is not None
    try:
        assert len(json.loads(leader.stdout.readline())) == 2
        found = json.loads(leader.stdout.readline())
        assert [tuple(token_ids) for token_ids in found] == [expected[i] for i in range(8)]
        assert list((tmp_path / "cache").rglob("model.safetensors"))
        follower.send_signal(signal.SIGTERM)
        assert follower.wait(60) == 128 + signal.SIGTERM
        assert json.loads(leader.stdout.readline())[0] == "EngineFault"
    finally:
        for process in (leader, follower):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
            print(out, err)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "small_rank"), [("paged", "1"), ("paged", "0"), ("zero", "1")])
def test_a_rank_of_either_host_that_is_out_of_memory_has_both_hosts_start_again_with_less(
    hosts, tmp_path, backend, small_rank
):
    run = planned(tmp_path, MODEL)
    expected = tokens_of_one_host()
    settings = DistributedConfig(
        num_hosts=2, rendezvous="10.77.0.1:29500", interface=CABLE, timeout_s=TIMEOUT_S
    )
    sizes = {"paged": {"max_num_batched_tokens": 32}, "zero": {}}[backend]
    asked = dataclasses.replace(
        config(tensor_parallel_size=2, distributed=settings, max_num_seqs=8, **sizes),
        backend=backend,
    )
    memory = {
        "NIGHTJAR_TEST_SMALL_RANK": small_rank,
        "NIGHTJAR_TEST_MOST_TOKENS": "20",  # the first step has 24
        "NIGHTJAR_TEST_MOST_ROWS": "3",
    }
    document = json.dumps(dataclasses.asdict(asked))
    leader = start(
        hosts[0],
        sys.executable,
        *("-m", "tests.ranked_owner", document, "tests.small_rank"),
        **memory,
    )
    follower = start(
        hosts[1],
        *(sys.executable, "-m", "tests.small_follower"),
        **environment_of(run, tmp_path),
        **memory,
        GLOO_SOCKET_IFNAME=CABLE,
    )
    assert leader.stdout is not None
    with ended(leader, follower):
        before = json.loads(leader.stdout.readline())
        assert len(before) == 2
        found = json.loads(leader.stdout.readline())
        assert [tuple(token_ids) for token_ids in found] == [expected[i] for i in range(8)]
        assert not any(map(is_alive, before))
        leader.kill()  # from here on there is nobody to follow
        assert follower.wait(3 * TIMEOUT_S) == 1
        assert follower.stderr is not None
        assert follower.stderr.read().count("start again with the first host's") == 1
