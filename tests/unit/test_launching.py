"""What ranks are started with, what they say, how they end: the pure parts of the launcher."""

import dataclasses
import json
from typing import Any

import pytest
import torch.distributed as dist

from inference.backends.base import BackendInfo
from inference.backends.shrinking import Shrinking
from inference.config import DistributedConfig, EngineConfig, config_from_json
from inference.errors import EngineConfigError, EngineFault, ModelError, OutOfMemory
from inference.heads import check_heads, possible_sizes
from inference.launch import Launch, command, environment
from inference.preflight_collective import Fabric, RankFacts, remarks_on
from inference.rank_exit import ExitCode, code_of, error_of, telling
from inference.rank_messages import (
    Decoder,
    completion_from_json,
    completion_to_json,
    encode,
    info_from_json,
    info_to_json,
    sequence_from_json,
    sequence_to_json,
)
from inference.sampling import SamplingParams
from inference.sequence import Completion, Sequence, TokenLogprob
from inference.vocabulary import columns_of

NCCL_FULL = dist.DistBackendError("ncclUnhandledCudaError: Cuda failure 2 'out of memory'")


def test_one_host_needs_nothing_and_never_asks_what_its_name_resolves_to():
    env = environment(DistributedConfig())
    assert env["GLOO_SOCKET_IFNAME"] == "lo"
    assert not {"NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_NET"} & env.keys()


@pytest.mark.parametrize(
    ("fabric", "expected"),
    [
        ("auto", {}),
        ("tcp", {"NCCL_IB_DISABLE": "1", "NCCL_NET": "Socket"}),
        ("infiniband", {"NCCL_IB_DISABLE": "0", "NCCL_NET": "IB"}),
        ("roce", {"NCCL_IB_DISABLE": "0", "NCCL_NET": "IB", "NCCL_IB_ROCE_VERSION_NUM": "2"}),
    ],
)
def test_settings_become_what_nccl_and_gloo_read(fabric, expected):
    settings = DistributedConfig(
        num_hosts=2, rendezvous="a:1", interface="eth1", fabric=fabric, timeout_s=120
    )
    assert environment(settings) == {
        "NCCL_SOCKET_IFNAME": "=eth1",
        "GLOO_SOCKET_IFNAME": "eth1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "240",
        **expected,
    }


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_hosts_meet_where_the_job_says(launcher):
    settings = DistributedConfig(launcher=launcher, num_hosts=2, rendezvous="node-0.ranks:29500")
    line = command(
        Launch(module="inference", args=["x"], num_ranks=4, host_rank=1, distributed=settings)
    )
    text = " ".join(line).replace("_", "-")
    assert "--master-addr=node-0.ranks --master-port=29500" in text
    assert "--node-rank=1" in text
    assert line[-2:] == ["inference", "x"]


@pytest.mark.parametrize(("num_hosts", "is_again"), [(1, True), (2, False)])
def test_only_hosts_that_have_met_before_expect_each_other_soon(num_hosts, is_again):
    settings = DistributedConfig(num_hosts=num_hosts, rendezvous="node-0:29500", timeout_s=20)
    launch = Launch(module="inference", num_ranks=1, distributed=settings, is_again=is_again)
    assert not any("timeout" in option for option in command(launch))
    again = dataclasses.replace(
        launch, distributed=dataclasses.replace(settings, num_hosts=2), is_again=True
    )
    assert "--rdzv-conf=timeout=80" in command(again)


def test_ranks_over_several_hosts_shrink_as_those_of_one_do():
    settings = DistributedConfig(num_hosts=2, rendezvous="node-0:29500")
    shrinking = Shrinking(
        EngineConfig(
            model="m",
            backend="paged",
            tensor_parallel_size=2,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            distributed=settings,
        )
    )
    assert shrinking.shrink(OutOfMemory("full"), None) is None
    assert shrinking.config.max_num_batched_tokens == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hosts": 0}, "num_hosts must be at least 1, got 0"),
        ({"num_hosts": 2}, "num_hosts is 2: needs engine.distributed.rendezvous"),
        ({"rendezvous": "host"}, "rendezvous must be host:port, got 'host'"),
        ({"timeout_s": 0}, "timeout_s must be above 0, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**changes)


def test_a_size_must_divide_over_the_hosts():
    with pytest.raises(EngineConfigError, match="is 3: does not divide over 2 hosts"):
        EngineConfig(
            model="m",
            tensor_parallel_size=3,
            distributed=DistributedConfig(num_hosts=2, rendezvous="a:1"),
        )


def test_a_config_survives_its_way_to_a_rank():
    config = EngineConfig(
        model="m",
        tensor_parallel_size=2,
        max_num_seqs=7,
        allowed_code=("a" * 64,),
        distributed=DistributedConfig(interface="eth0", timeout_s=9.5),
    )
    assert config_from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_what_ranks_and_replica_say_survives_any_cut_of_the_stream():
    sequence = Sequence(
        7,
        [1, 2, 3],
        SamplingParams(temperature=0.5, stop=("a", "\ud83d"), stop_token_ids=(4,), logprobs=2),
        draw_seed=2**64 - 1,
    )
    completion = Completion(
        seq_id=7,
        token_ids=(1, 2),
        text="q\u00e9\u4e2d",
        finish_reason="stop",
        logprobs=(TokenLogprob(1, -0.25, ((1, -0.25), (9, float("-inf")))),),
        num_cached_tokens=3,
    )
    info = BackendInfo(
        backend="paged", device="cpu", dtype="float32", max_model_len=9, max_num_seqs=2
    )
    messages: list[dict[str, Any]] = [
        {"kind": "submit", "sequences": [sequence_to_json(sequence)]},
        {"kind": "progress", "completions": [completion_to_json(completion)]},
        {"kind": "ready", "info": info_to_json(info)},
    ]
    stream = b"".join(encode(message) for message in messages)
    decoder = Decoder()
    heard = [
        message
        for at in range(0, len(stream), 11)
        for message in decoder.feed(stream[at : at + 11])
    ]
    again = sequence_from_json(heard[0]["sequences"][0])
    assert (again.seq_id, again.prompt_token_ids, again.sampling, again.draw_seed) == (
        *(7, [1, 2, 3], sequence.sampling),
        2**64 - 1,
    )
    assert completion_from_json(heard[1]["completions"][0]) == completion
    assert info_from_json(heard[2]["info"]) == info


def test_a_stream_that_is_not_ours_is_refused():
    with pytest.raises(ValueError, match="at most"):
        list(Decoder().feed(b"GET / HTTP/1.1\r\n"))


@pytest.mark.parametrize(
    ("error", "code", "kind", "is_retryable"),
    [
        (EngineConfigError("x"), ExitCode.CONFIG_ERROR, EngineConfigError, False),
        (ModelError("x"), ExitCode.MODEL_ERROR, ModelError, False),
        (NCCL_FULL, ExitCode.OUT_OF_MEMORY, OutOfMemory, True),
        (OutOfMemory("x"), ExitCode.OUT_OF_MEMORY, OutOfMemory, True),
        (EngineFault("x"), ExitCode.ENGINE_FAULT, EngineFault, True),
        (RuntimeError("x"), ExitCode.ENGINE_FAULT, EngineFault, True),
        (TypeError("x"), ExitCode.FAULT, EngineFault, True),
    ],
)
def test_how_a_rank_ends_says_whether_trying_again_helps(error, code, kind, is_retryable):
    assert code_of(error) == code
    met = error_of(code, "x")
    assert type(met) is kind
    assert met.retryable is is_retryable


def test_the_cause_is_told_from_its_consequences():
    endings = [ExitCode.LOST_PEER, ExitCode.ENGINE_FAULT, None, ExitCode.OUT_OF_MEMORY]
    assert min(endings, key=telling) == ExitCode.OUT_OF_MEMORY
    assert min(endings[:3], key=telling) is None


def facts(
    host: str = "a", nccl: tuple[int, ...] = (2, 27, 5), infiniband: bool = True
) -> RankFacts:
    return RankFacts(host=host, device="H100", nccl=nccl, has_infiniband=infiniband)


@pytest.mark.parametrize(
    ("bandwidth", "found", "remark"),
    [
        (300.0, [facts(), facts()], ""),
        (300.0, [facts(nccl=(2, 18, 3)), facts(nccl=(2, 18, 3))], "NCCL 2.18.3 is old; use 2.20"),
        (300.0, [facts(), facts(nccl=(2, 21, 5))], "ranks have NCCL 2.21.5 and 2.27.5"),
        (22.0, [facts(), facts()], "reaches 22.0 GB/s: no NVLink between these devices"),
        (
            1.1,
            [facts(), facts("b", infiniband=False)],
            "no InfiniBand device on b: hosts talk over TCP",
        ),
        (1.1, [facts(), facts("b")], "NCCL has fallen back to TCP"),
        (11.0, [facts(), facts("b")], ""),
        (0.5, [facts(nccl=()), facts(nccl=())], ""),  # CPUs over gloo promise nothing
    ],
)
def test_what_slows_the_ranks_is_said_plainly(bandwidth, found, remark):
    remarks = remarks_on(Fabric(bandwidth=bandwidth, latency_us=20.0, facts=tuple(found)))
    assert len(remarks) == bool(remark)
    assert remark in "".join(remarks)


def test_the_sizes_that_work_are_named():
    assert possible_sizes(64, 8) == [1, 2, 4, 8]
    with pytest.raises(EngineConfigError, match=r"does not divide 1 KV heads and 4 .*; use 1$"):
        check_heads(2, num_heads=4, num_kv_heads=1)


@pytest.mark.parametrize(("size", "ranks"), [(10, 4), (97, 3), (8, 8), (3, 2), (5, 4)])
def test_ranks_have_every_column_once(size, ranks):
    columns = [columns_of(size, rank, ranks) for rank in range(ranks)]
    assert [c for start, stop in columns for c in range(start, stop)] == list(range(size))
