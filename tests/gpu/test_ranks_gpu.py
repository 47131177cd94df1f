"""Tensor parallel on two devices: NCCL, captured graphs and the device sampler give one device's tokens."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from inference.backends import create_backend
from inference.config import DistributedConfig, EngineConfig
from inference.sampling import SamplingParams
from inference.sequence import Sequence
from tests.ports import free_port
from tests.tiny_models import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

SAMPLINGS = [
    SamplingParams(max_tokens=24, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=0.9, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=1.0, top_p=0.8, top_k=40, ignore_eos=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return make_model(tmp_path_factory.mktemp("model"), config)


def generate(model: Path, size: int, **changes: Any) -> dict[int, tuple[int, ...]]:
    settings = {"backend": "paged", "dtype": "float32", "max_num_seqs": 64, "max_model_len": 256}
    backend = create_backend(
        EngineConfig(model=str(model), tensor_parallel_size=size, **{**settings, **changes})
    )
    try:
        backend.submit(
            Sequence(i, list(range(5, 25 + i)), SAMPLINGS[i % 3], draw_seed=i) for i in range(48)
        )
        found = {}
        while backend.num_unfinished:
            found.update({c.seq_id: c.token_ids for c in backend.step()})
        return found
    finally:
        backend.close()


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_two_devices_give_the_tokens_of_one(model, enforce_eager):
    expected = generate(model, 1)
    found = generate(model, 2, enforce_eager=enforce_eager)
    # fp32 sums of another order: a draw may differ where two scores agree to the last places
    assert sum(found[i] == expected[i] for i in expected) >= 46


def test_experts_on_two_devices_give_the_tokens_of_one(tmp_path):
    config = transformers.Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = make_model(tmp_path / "model", config)
    expected, found = generate(model, 1), generate(model, 2)
    assert sum(found[i] == expected[i] for i in expected) >= 46


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_zero_over_two_devices_gives_the_tokens_of_one(model, offload):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    expected = generate(model, 1, backend="transformers")
    found = generate(model, 2, backend="zero", offload=offload, max_num_seqs=16)
    assert sum(found[i] == expected[i] for i in expected) >= 46


@contextmanager
def second_host(folder: Path, port: int) -> Iterator[None]:
    """The second device as a host of its own: by name, and to NCCL, which then speaks through sockets only."""
    (folder / "sitecustomize.py").write_text(
        "import socket\nsocket.gethostname = lambda: 'second'\n"
    )
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--node-rank=1"),
            *("--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"),
            *("-m", "inference"),
        ],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "1",
            "NCCL_HOSTID": "second",
            "NCCL_SOCKET_IFNAME": "=lo",
            "NCCL_NET": "Socket",
            "NCCL_IB_DISABLE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        },
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_device_each_of_two_hosts_gives_the_tokens_of_one(
    model, tmp_path, monkeypatch, enforce_eager
):
    expected = generate(model, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("NCCL_HOSTID", "first")
    port = free_port()
    settings = DistributedConfig(
        num_hosts=2, rendezvous=f"127.0.0.1:{port}", interface="lo", fabric="tcp", timeout_s=60
    )
    with second_host(tmp_path, port):
        found = generate(model, 2, enforce_eager=enforce_eager, distributed=settings)
    assert sum(found[i] == expected[i] for i in expected) >= 46


def test_sums_through_peers_are_those_of_nccl():
    script = str(Path(__file__).parents[1] / "rank_peer_sum.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*torchrun, "--standalone", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("the same bits") == 2, found.stdout
