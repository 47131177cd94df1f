"""Predicted times agree with what was measured on an H100, and with a step-by-step simulation.

The numbers below are of 2026-11-25: one H100 80GB, torch 2.11 (CUDA 13), random weights, greedy,
forced completion lengths. `limit` is a serial bound at 800 TFLOP/s and 3.35 TB/s, `simulated` a
step-by-step simulation of an ordinary good engine that reads a shared prefix for every row; `measured` is this
engine (tests/benchmarks/results/engine_h100_202611.md).
"""

import math
import random
from dataclasses import replace

import pytest

from inference.model_config import model_shape
from inference.model_shape import QUANTIZED_BYTES
from inference.prediction import predict, predict_offloaded
from inference.request_mixes import requests
from inference.roofline import (
    MAX_NUM_SEQS,
    STATIC_LAYER_S,
    STATIC_NUM_SEQS,
    Replica,
)
from inference.tier_fit import REPLICAS_FIRST
from inference.workload import Workload
from tasks.hardware import load_hardware

GPUS = {gpu.name: gpu for gpu in load_hardware()}
H100 = GPUS["H100"]


def qwen3(layers, hidden, ffn, heads, kv_heads, **extra):
    return model_shape(
        {
            "model_type": "qwen3_moe" if "num_experts" in extra else "qwen3",
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 128,
            "vocab_size": 151936,
            "dtype": "bfloat16",
            **extra,
        }
    )


MODELS = {
    "0.6B": qwen3(28, 1024, 3072, 16, 8, tie_word_embeddings=True),
    "8B": qwen3(36, 4096, 12288, 32, 8),
    "32B": qwen3(64, 5120, 25600, 64, 8),
    "30B-A3B": qwen3(
        48, 2048, 6144, 32, 4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768
    ),
    "235B-A22B": qwen3(
        94, 4096, 12288, 64, 4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536
    ),
}


def mix(name, count):
    """Lengths of one of the three measured mixes, drawn anew from the same distributions."""
    draw = random.Random(1)

    def log_normal(median, sigma, low, high):
        return max(low, min(high, round(math.exp(draw.gauss(math.log(median), sigma)))))

    lengths = {
        "uniform": lambda: (draw.randint(100, 1024), draw.randint(100, 1024)),
        "chat": lambda: (log_normal(120, 1.0, 8, 2048), log_normal(150, 0.8, 8, 1024)),
        "template": lambda: (512 + log_normal(160, 0.7, 16, 1536), log_normal(96, 0.7, 8, 512)),
    }[name]
    reused = 512 * (count - 1) if name == "template" else 0
    return Workload.of([lengths() for _ in range(count)], num_reused_prompt_tokens=reused)


# model, mix, count, limit s, simulated s
BF16 = [
    ("0.6B", "uniform", 256, 4.98, 6.1),
    ("0.6B", "chat", 1024, 3.45, 4.5),
    ("8B", "uniform", 256, 12.90, 15.8),
    ("8B", "chat", 1024, 13.70, 17.3),
    ("8B", "chat", 4096, 44.30, 57.0),
]


@pytest.mark.parametrize(("model", "name", "count", "limit", "simulated"), BF16)
def test_a_predicted_run_lies_within_15_percent_of_the_simulated_one(
    model, name, count, limit, simulated
):
    seconds = predict(Replica(shape=MODELS[model], gpu=H100), mix(name, count)).seconds
    assert seconds == pytest.approx(simulated, rel=0.15)
    assert seconds > limit


@pytest.mark.parametrize(
    ("model", "quantization", "name", "count", "measured"),
    [
        ("0.6B", "none", "uniform", 256, 6.84),
        ("0.6B", "none", "chat", 1024, 5.12),
        ("0.6B", "none", "template", 1024, 3.07),
        ("8B", "none", "uniform", 256, 15.45),
        ("8B", "none", "chat", 1024, 15.53),
        ("8B", "none", "template", 1024, 11.08),
        ("8B", "fp8", "uniform", 256, 10.68),
        ("8B", "fp8", "chat", 1024, 10.89),
        ("8B", "fp8", "template", 1024, 7.64),
        ("30B-A3B", "none", "chat", 1024, 26.59),
        ("30B-A3B", "fp8", "chat", 1024, 17.06),
        ("32B over 4", "none", "chat", 1024, 19.89),
        ("235B-A22B over 4", "fp8", "chat", 1024, 39.58),
    ],
)
def test_every_shape_that_was_measured_is_predicted_within_20_percent(
    model, quantization, name, count, measured
):
    model, _, ranks = model.partition(" over ")
    replica = Replica(
        shape=MODELS[model],
        gpu=H100,
        tensor_parallel_size=int(ranks or 1),
        quantization=quantization,
        kv_cache_dtype="fp8" if quantization == "fp8" else "auto",
    )
    assert predict(replica, mix(name, count)).seconds == pytest.approx(measured, rel=0.20)


@pytest.mark.parametrize(
    ("running", "context", "measured_ms"), [(256, 700, 6.45), (1024, 300, 15.2)]
)
def test_a_decode_step_of_twelve_8b_layers_lies_within_8_percent_of_the_measured_one(
    running, context, measured_ms
):
    replica = Replica(shape=qwen3(12, 4096, 12288, 32, 8), gpu=H100)
    assert replica.step_s(running, 0, context, 100) * 1e3 == pytest.approx(measured_ms, rel=0.08)


# Completion tokens/s (thousands) the simulation gives for 1,000 rows of 1024 in and 256 out.
@pytest.mark.parametrize(
    ("model", "quantization", "thousands"),
    [
        ("0.6B", "none", 17.9), ("8B", "none", 5.6), ("8B", "fp8", 7.6), ("32B", "fp8", 2.2),
        ("30B-A3B", "none", 4.4), ("30B-A3B", "fp8", 9.7),
    ],
)  # fmt: skip
def test_long_prompts_are_predicted_within_15_percent_of_the_simulation(
    model, quantization, thousands
):
    workload = Workload.of([(1024, 256)] * 1000)
    replica = Replica(shape=MODELS[model], gpu=H100, quantization=quantization, max_num_seqs=4096)
    per_s = workload.num_completion_tokens / predict(replica, workload).seconds
    assert per_s / 1e3 == pytest.approx(thousands, rel=0.15)


# Seconds as tests/benchmarks/results/{engine_h100,ranks_h100,ranks_h200}_202611.md have them.
MEASURED = [
    ("H100", "8B", "none", 1, "uniform", 256, 15.46), ("H100", "8B", "none", 1, "chat", 1024, 15.40),
    ("H100", "8B", "none", 1, "template", 1024, 10.85), ("H100", "8B", "none", 1, "chat", 4096, 56.13),
    ("H100", "8B", "fp8", 1, "uniform", 256, 9.90), ("H100", "8B", "fp8", 1, "chat", 1024, 10.16),
    ("H100", "8B", "fp8", 1, "template", 1024, 7.41), ("H100", "0.6B", "none", 1, "uniform", 256, 6.86),
    ("H100", "0.6B", "none", 1, "chat", 1024, 5.21), ("H100", "0.6B", "none", 1, "template", 1024, 2.94),
    ("H200", "8B", "none", 1, "chat", 512, 9.42), ("H200", "32B", "none", 1, "chat", 512, 32.79),
    ("H200", "8B", "none", 2, "chat", 1024, 10.68), ("H200", "32B", "none", 2, "chat", 1024, 30.90),
    ("H100", "30B-A3B", "none", 1, "chat", 1024, 26.83), ("H100", "32B", "none", 2, "chat", 1024, 31.87),
    ("H100", "8B", "none", 1, "chat", 512, 10.5), ("H100", "8B", "none", 2, "chat", 1024, 10.0),
    ("H100", "32B", "none", 1, "chat", 512, 41.43),
]  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "model", "quantization", "ranks", "mix", "count", "measured_s"), MEASURED
)
def test_what_was_measured_is_predicted_within_20_percent(
    gpu, model, quantization, ranks, mix, count, measured_s
):
    replica = Replica(
        shape=MODELS[model],
        gpu=GPUS[gpu],
        tensor_parallel_size=ranks,
        quantization=quantization,
        kv_cache_dtype="fp8" if quantization == "fp8" else "auto",
    )
    workload = Workload.of(
        [(len(prompt), length) for prompt, length in requests(mix, count)],
        num_reused_prompt_tokens=512 * (count - 1) if mix == "template" else 0,
    )
    assert predict(replica, workload).seconds == pytest.approx(measured_s, rel=0.2)


# model, layers, quantisation, backend, mix, rows, seconds
UNFUSED = [
    ("0.6B", "unfused", "none", "paged", "chat", 1024, 9.89), ("0.6B", "unfused", "none", "paged", "uniform", 256, 11.01),
    ("8B", "unfused", "none", "paged", "chat", 1024, 22.15), ("8B", "unfused", "none", "paged", "uniform", 256, 21.69),
    ("0.6B", "fused", "nf4", "paged", "chat", 1024, 5.92), ("0.6B", "fused", "nf4", "paged", "uniform", 256, 7.61),
    ("0.6B", "fused", "nf4", "paged", "template", 1024, 3.28), ("8B", "fused", "nf4", "paged", "chat", 1024, 23.79),
    ("8B", "fused", "nf4", "paged", "uniform", 256, 23.91), ("8B", "fused", "nf4", "paged", "template", 1024, 15.00),
    ("0.6B", "fused", "int8", "paged", "template", 256, 55.66), ("8B", "fused", "int8", "paged", "template", 256, 85.47),
    ("0.6B", "fused", "none", "transformers", "template", 128, 88.77),
    ("8B", "fused", "none", "transformers", "template", 128, 117.19),
    ("0.6B", "fused", "nf4", "transformers", "template", 128, 112.33),
    ("0.6B", "fused", "int8", "transformers", "template", 64, 80.01),
    ("0.6B", "gptq", "none", "transformers", "template", 64, 45.87),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "layers", "quantization", "backend", "mix", "count", "measured_s"), UNFUSED
)
def test_layers_that_are_not_fused_or_not_captured_are_predicted_within_20_percent(
    model, layers, quantization, backend, mix, count, measured_s
):
    shape = replace(MODELS[model], is_fused=layers != "unfused")
    if layers == "gptq":
        shape = replace(shape, stored_quantization="gptq", stored_bits=4.625)
    replica = Replica(
        shape=shape,
        gpu=H100,
        quantization=quantization,
        backend=backend,
        max_num_seqs=STATIC_NUM_SEQS if backend == "transformers" else MAX_NUM_SEQS,
    )
    workload = Workload.of(
        [(len(prompt), length) for prompt, length in requests(mix, count)],
        num_reused_prompt_tokens=512 * (count - 1) if mix == "template" else 0,
    )
    assert predict(replica, workload).seconds == pytest.approx(measured_s, rel=0.2)


def test_weights_stored_by_bitsandbytes_are_predicted_like_those_it_quantises_when_loading():
    workload = Workload.of([(len(prompt), length) for prompt, length in requests("chat", 1024)])
    for kind in ("int8", "nf4"):
        made = Replica(shape=MODELS["8B"], gpu=H100, quantization=kind)
        bits = 8 * QUANTIZED_BYTES[kind]
        stored = replace(
            made,
            shape=replace(MODELS["8B"], stored_quantization="bitsandbytes", stored_bits=bits),
            quantization="none",
        )
        assert predict(stored, workload) == predict(made, workload)


def test_batches_that_start_together_last_as_long_as_their_longest_rows():
    shape = MODELS["8B"]
    one = Replica(shape=shape, gpu=H100, backend="transformers", max_num_seqs=10)
    step_s = shape.num_layers * STATIC_LAYER_S["none"]
    many = replace(one, max_num_seqs=STATIC_NUM_SEQS)
    equal = predict(many, Workload.of([(10, 600)] * 128))
    assert equal.steady_s == pytest.approx(600 * step_s)  # long completions are no reason for more
    whole = predict(many, Workload.of([(40_000, 10)] * 100))
    assert whole.num_running == 1  # one and a half would fit
    alone = predict(one, Workload.of([(10, 100)] * 10))
    assert alone.steady_s == pytest.approx(100 * step_s)
    assert predict(one, Workload.of([(10, 100)] * 95)).steady_s == pytest.approx(1000 * step_s)
    mixed = predict(one, Workload.of([(10, 100)] * 9 + [(10, 900)]))
    assert mixed.steady_s == pytest.approx(900 * step_s)
    apart = predict(one, Workload.of([(10, 100)] * 99 + [(10, 900)]))  # one batch of ten has it
    assert apart.steady_s == pytest.approx((9 * 100 + 900) * step_s)


@pytest.mark.parametrize(
    ("gpu", "model", "two_ranks_s", "two_replicas_s"),
    [("H100", "8B", 10.0, 10.5), ("H100", "32B", 31.87, 41.43),
     ("H200", "8B", 10.68, 9.42), ("H200", "32B", 30.90, 32.79)],
)  # fmt: skip
def test_two_ranks_win_over_two_replicas_by_enough_where_they_did_when_measured(
    gpu, model, two_ranks_s, two_replicas_s
):
    whole = Workload.of([(len(prompt), length) for prompt, length in requests("chat", 1024)])
    half = Workload.of([(len(prompt), length) for prompt, length in requests("chat", 512)])
    one = Replica(shape=MODELS[model], gpu=GPUS[gpu])
    predicted_s = predict(replace(one, tensor_parallel_size=2), whole).seconds
    is_enough = predict(one, half).seconds > predicted_s * (1 + REPLICAS_FIRST)
    assert is_enough == (two_replicas_s > two_ranks_s * (1 + REPLICAS_FIRST))


@pytest.mark.parametrize(
    ("model", "quantization", "tokens"),
    [("0.6B", "none", 692e3), ("8B", "none", 435e3), ("8B", "fp8", 482e3), ("32B", "none", 57e3),
     ("32B", "fp8", 176e3), ("30B-A3B", "none", 198e3), ("30B-A3B", "fp8", 502e3)],
)  # fmt: skip
def test_kv_room_on_an_h100_is_what_5_gb_of_reserve_leave(model, quantization, tokens):
    replica = Replica(shape=MODELS[model], gpu=H100, quantization=quantization)
    assert replica.kv_tokens == pytest.approx(tokens, rel=0.02)


def test_two_ranks_beat_two_replicas_only_where_weights_starve_the_kv_cache():
    workload = Workload.from_totals(16_000, 3_200_000, 3_040_000, max_completion_tokens=1000)
    gain = {}
    for model, quantization in (
        ("8B", "none"),
        ("32B", "none"),
        ("32B", "fp8"),
        ("30B-A3B", "none"),
    ):
        one = Replica(shape=MODELS[model], gpu=H100, quantization=quantization)
        two = replace(one, tensor_parallel_size=2)
        gain[model, quantization] = (
            predict(one, workload.share(2)).seconds / predict(two, workload).seconds
        )
    assert gain["32B", "none"] > 1.1
    assert gain["30B-A3B", "none"] > 1.1
    assert gain["8B", "none"] < 0.95
    assert gain["32B", "fp8"] < 0.95


def test_an_all_reduce_over_the_network_is_dearer_than_over_nvlink():
    inside = Replica(shape=MODELS["32B"], gpu=H100, tensor_parallel_size=8)
    across = replace(inside, gpu=replace(H100, gpus_per_host=4))
    assert across.spans_hosts
    assert across.step_s(512, 0, 500, 300) > 1.3 * inside.step_s(512, 0, 500, 300)


def test_offloaded_weights_run_at_the_speed_of_the_bus():
    shape = MODELS["32B"]
    replica = Replica(shape=shape, gpu=H100)
    workload = Workload.of([(200, 200)] * 500)
    prediction, pass_s = predict_offloaded(
        replica, workload, source_bandwidth=H100.pcie_bandwidth, num_ranks=1
    )
    assert pass_s == pytest.approx(65.5e9 / 54.9e9, rel=0.01)
    # All rows fit at once: one pass for each completion token, and a few for the prompts.
    assert prediction.seconds == pytest.approx((200 + 13) * pass_s, rel=0.05)
    assert prediction.seconds > 5 * predict(replica, workload).seconds


def test_grouping_keeps_every_token_and_the_longest_completion():
    lengths = [(100 + i, 3 * i + 1) for i in range(1000)]
    workload = Workload.of(lengths)
    assert workload.num_sequences == 1000
    assert workload.num_prompt_tokens == pytest.approx(sum(p for p, _ in lengths))
    assert workload.num_completion_tokens == pytest.approx(sum(c for _, c in lengths))
    assert workload.classes[-1].num_completion_tokens == 2998
    assert workload.max_sequence_tokens == 1099 + 2998
    assert len(workload.classes) <= 33


@pytest.mark.parametrize("limit", [None, 300, 5000])
def test_a_workload_of_totals_keeps_them(limit):
    workload = Workload.from_totals(1000, 500_000, 200_000, max_completion_tokens=limit)
    assert workload.num_prompt_tokens == pytest.approx(500_000)
    assert workload.num_completion_tokens == pytest.approx(200_000)
    assert all(c.num_completion_tokens <= (limit or 1600) for c in workload.classes)


def test_rows_without_completions_cost_their_prefill_only():
    workload = Workload.of([(1000, 0)] * 100)
    prediction = predict(Replica(shape=MODELS["8B"], gpu=H100), workload)
    assert prediction.drain_s == prediction.steady_s == 0
    assert 1.5 < prediction.prefill_s < 3.0


def test_an_empty_workload_is_refused():
    with pytest.raises(ValueError, match="at least one sequence"):
        Workload.of([])
