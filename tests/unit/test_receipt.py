from collections import Counter

import pytest

from inference.backends.base import BackendInfo, EngineStats
from inference.model_shape import ModelShape
from tasks.hardware import load_hardware
from tasks.metering import Mark, Meter
from tasks.receipt import ShardFacts, shard_receipt
from tasks.repetition import is_repetitive
from tasks.run_engine import describe_memory
from tasks.yardstick import Yardstick

H100 = next(gpu for gpu in load_hardware() if gpu.name == "H100")
SHAPE = ModelShape(
    family="qwen3",
    dtype="bfloat16",
    num_layers=36,
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151_936,
    tied_embeddings=False,
    max_model_len=40_960,
    num_attention_params=1_500_000_000,
    num_mlp_params=5_400_000_000,
    num_expert_params=0,
    num_other_params=300_000,
    intermediate_size=12_288,
)
INFO = BackendInfo(
    backend="paged",
    device="NVIDIA H100 80GB HBM3",
    dtype="bfloat16",
    max_model_len=1,
    max_num_seqs=1,
    memory={"weights": 16_400_000_000, "step": 2_000_000_000, "kv_cache": 51_000_000_000},
)


def receipt(
    meter, *, wall=100.0, prefill_s=10.0, decode_s=80.0, yardstick=None, completion=160_000
):
    stats = EngineStats(
        prefill_s=prefill_s, decode_s=decode_s, num_steps=2000, num_prompt_tokens=400_000
    )
    return shard_receipt(
        info=INFO,
        stats=stats,
        before=Mark(at=0.0),
        after=Mark.take(stats, meter, at=wall),
        facts=ShardFacts(
            states=Counter(ok=1000),
            tokens=Counter(prompt=400_000, completion=completion, context=90_000_000),
            lengths={"160": 1000},
        ),
        yardstick=yardstick or Yardstick(),
    )


def test_time_is_split_between_engine_waiting_and_the_rest():
    found = receipt(Meter(step_s=90.0, tail_s=8.0, read_s=2.0, tokenise_s=4.0, write_s=1.0))
    assert found["seconds"] == {
        "stage": 0.0,
        "load": 0.0,
        "warm_up": 0.0,
        "start": 0.0,
        "canary": 0.0,
        "read": 2.0,
        "tokenise": 4.0,
        "prefill": 10.0,
        "decode": 72.0,
        "tail": 8.0,
        "write": 1.0,
        "other": 3.0,
    }
    assert found["summary"] == (
        "1,600 tokens/s over 100.0 s; the largest loss, 8 %, was the tail, while the last sequences "
        "ended and the batch ran empty."
    )


def test_a_receipt_says_what_the_engine_reserved_for_what():
    found = receipt(Meter(step_s=90.0))
    assert found["reserved_device_bytes"] == INFO.memory
    assert found["reserved_device_bytes"] is not INFO.memory
    assert describe_memory(INFO) == (
        "engine on NVIDIA H100 80GB HBM3, reserved on each device: weights 16.40 GB, step 2.00 GB, "
        "kv_cache 51.00 GB"
    )


def test_an_engine_that_counts_less_than_its_steps_took_is_scaled_to_them():
    found = receipt(Meter(step_s=45.0), prefill_s=1.0, decode_s=8.0)["seconds"]
    assert (found["prefill"], found["decode"], found["other"]) == (5.0, 40.0, 55.0)


def test_shares_of_the_roofline_follow_from_the_data_sheet():
    yardstick = Yardstick(shape=SHAPE, gpu=H100, price_per_hour=2.0)
    found = receipt(Meter(step_s=90.0), yardstick=yardstick)
    flops = 400_000 * (2 * SHAPE.num_active_params + 2 * 36 * 32 * 128 * 400)
    assert found["roofline"]["prefill_share_of_flops"] == pytest.approx(
        flops / 10 / 989e12, rel=1e-3
    )
    read = 2000 * 80 / 90 * SHAPE.weight_bytes() + 90_000_000 * SHAPE.kv_bytes_per_token()
    assert found["roofline"]["decode_share_of_bandwidth"] == pytest.approx(
        read / 80 / 3350e9, rel=1e-3
    )
    assert found["usd"] == pytest.approx(100 / 3600 * 2.0, abs=1e-6)
    assert found["roofline"]["gpu"] == "H100"
    assert "decoding at" in found["summary"]


def test_nothing_generated_is_said_plainly_and_rates_are_null():
    found = receipt(Meter(), wall=0.0, completion=0)
    assert found["completion_tokens_per_s"] is None
    assert found["summary"] == "No tokens were generated."


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([7] * 32, True),
        ([7] * 31, False),
        (list(range(40)), False),
        ([1, 2, 3] * 11, True),
        ([*range(100), *[4, 5] * 16], True),
        ([*[4, 5] * 40, 9], False),
        (list(range(16)) * 4, True),
        (list(range(16)) * 3, False),
        ([], False),
    ],
)
def test_a_completion_that_ends_in_circles_is_noticed(tokens, expected):
    assert is_repetitive(tokens) is expected


def test_a_shard_that_ended_with_the_one_before_has_no_rate_of_its_own():
    meter = Meter()
    found = shard_receipt(
        info=INFO,
        stats=EngineStats(),
        before=Mark(at=5.0),
        after=Mark.take(EngineStats(), meter, at=5.0004),
        facts=ShardFacts(
            states=Counter(ok=10), tokens=Counter(prompt=100, completion=900), lengths={"90": 10}
        ),
        yardstick=Yardstick(),
    )
    assert found["completion_tokens_per_s"] is None
    assert found["summary"].startswith("It ended in the same step as the shard before it")


def test_reused_answers_are_told_apart_from_what_took_the_time():
    stats = EngineStats(decode_s=8.0, num_steps=100, num_prompt_tokens=50)
    found = shard_receipt(
        info=INFO,
        stats=stats,
        before=Mark(at=0.0),
        after=Mark.take(stats, Meter(step_s=8.0), at=10.0),
        facts=ShardFacts(
            states=Counter(ok=100),
            tokens=Counter(prompt=1000, completion=9000, context=90_000),
            lengths={"90": 100},
            reused=Counter(rows=92, completion=8280, context=80_000),
        ),
        yardstick=Yardstick(),
    )
    assert (found["num_sequences"], found["num_reused_rows"]) == (8, 92)
    assert (found["num_completion_tokens"], found["num_reused_completion_tokens"]) == (9000, 8280)
    assert found["completion_tokens_per_s"] == 72.0
