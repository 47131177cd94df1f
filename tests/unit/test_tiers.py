"""Which tiers fit, which one is chosen and why, and what a refusal says."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from inference.backends import check_engine
from inference.config import EngineConfig
from inference.errors import EngineConfigError
from inference.hardware import RESERVED_SHARE
from inference.model_config import model_shape
from inference.roofline import STATIC_NUM_SEQS, Replica
from inference.tier import Options
from inference.tier_price import LOAD_BANDWIDTH, PINNED_LOAD_BANDWIDTH, RANKS_STARTUP_S, STARTUP_S
from inference.tiers import choose_tier, size_model, tiers_table
from inference.weights import SmallFiles
from inference.workload import Workload
from tasks.hardware import load_hardware

GPUS = {gpu.name: gpu for gpu in load_hardware()}
PRICES = {"L4": 0.8, "A100-80": 2.0, "H100": 4.0}
WORKLOAD = Workload.from_totals(20_000, 10_000_000, 5_000_000, max_completion_tokens=1024)


def shape(layers, hidden, ffn, heads, kv_heads, family="qwen3", vocab=151936, **extra):
    return model_shape(
        {
            "model_type": family,
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 128,
            "vocab_size": vocab,
            "dtype": "bfloat16",
            **extra,
        }
    )


QWEN3_8B = shape(36, 4096, 12288, 32, 8)
QWEN3_14B = shape(40, 5120, 17408, 40, 8)
QWEN3_32B = shape(64, 5120, 25600, 64, 8)
LLAMA_70B = shape(80, 8192, 28672, 64, 8, family="llama", vocab=128256)
LLAMA_405B = shape(126, 16384, 53248, 128, 8, family="llama", vocab=128256)
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536}
QWEN3_235B = shape(94, 4096, 12288, 64, 4, family="qwen3_moe", **EXPERTS)


def smallest(model, gpu, quantization="none"):
    """(GPUs, tensor parallel, offload) of the smallest tier that fits; None when none does."""
    sizing = size_model(
        model, [GPUS[gpu]], WORKLOAD, options=Options(quantizations=(quantization,))
    )
    if not sizing.tiers:
        return None
    tier = sizing.tiers[0]
    return tier.num_gpus, tier.tensor_parallel_size, tier.offload


def priced(*names):
    return [replace(GPUS[name], price_per_hour=PRICES[name]) for name in names]


# The three sizes people speak of, as the function itself puts them.
@pytest.mark.parametrize(
    ("model", "gpu", "quantization", "expected"),
    [
        # about 7B: one card
        (QWEN3_8B, "L4", "none", (1, 1, "none")),
        (QWEN3_8B, "A10", "none", (1, 1, "none")),
        (QWEN3_8B, "A100-40", "none", (1, 1, "none")),
        (QWEN3_8B, "H100", "none", (1, 1, "none")),
        (QWEN3_8B, "T4", "none", (2, 2, "none")),
        (QWEN3_8B, "T4", "nf4", (1, 1, "none")),
        # 14B to 70B: quantisation, or several cards
        (QWEN3_14B, "L4", "none", (2, 2, "none")),
        (QWEN3_14B, "L4", "fp8", (1, 1, "none")),
        (QWEN3_32B, "H100", "none", (1, 1, "none")),
        (QWEN3_32B, "L40S", "none", (2, 2, "none")),
        (QWEN3_32B, "L40S", "fp8", (1, 1, "none")),
        (QWEN3_32B, "A10", "nf4", (1, 1, "none")),
        (LLAMA_70B, "H100", "none", (2, 2, "none")),
        (LLAMA_70B, "H100", "fp8", (1, 1, "none")),
        (LLAMA_70B, "A100-80", "nf4", (1, 1, "none")),
        (LLAMA_70B, "H200", "none", (1, 1, "none")),
        # 140B and more: eight cards and beyond
        (QWEN3_235B, "H100", "fp8", (4, 4, "none")),
        (QWEN3_235B, "H200", "none", (4, 4, "none")),
        (LLAMA_405B, "H100", "fp8", (8, 8, "none")),
        (LLAMA_405B, "H200", "none", (8, 8, "none")),
        (LLAMA_405B, "H100", "nf4", None),
        # and where it fits on no number of cards, from host memory or NVMe
        (QWEN3_235B, "H100", "none", (6, 1, "cpu")),
        (QWEN3_235B, "A100-80", "none", (6, 1, "cpu")),
        (LLAMA_405B, "H100", "none", (8, 1, "cpu")),
    ],
)
def test_the_smallest_tier_of_each_size(model, gpu, quantization, expected):
    if expected is None or expected[2] == "none":
        assert smallest(model, gpu, quantization) == expected
    else:
        sizing = size_model(model, [GPUS[gpu]], WORKLOAD, options=Options(quantizations=("none",)))
        found = [t for t in sizing.tiers if t.offload == expected[2]]
        assert (found[0].num_gpus, found[0].tensor_parallel_size) == expected[:2]
        assert found[0].backend == "zero"
        assert all(tier.offload != "none" for tier in sizing.tiers)


def test_every_tier_holds_the_longest_sequence_and_divides_the_heads():
    for model in (QWEN3_8B, QWEN3_32B, QWEN3_235B):
        for tier in size_model(model, list(GPUS.values()), WORKLOAD).tiers:
            assert tier.kv_tokens >= WORKLOAD.max_sequence_tokens
            assert model.num_key_value_heads % tier.tensor_parallel_size == 0
            assert (
                tier.offload != "none" or tier.num_gpus == tier.replicas * tier.tensor_parallel_size
            )


def test_more_gpus_of_a_type_are_never_predicted_to_be_slower():
    sizing = size_model(
        QWEN3_32B, [GPUS["H100"]], WORKLOAD, options=Options(quantizations=("none",))
    )
    rates = [tier.completion_tokens_per_s for tier in sizing.tiers]
    assert rates == sorted(rates)


def test_the_cheapest_tier_is_chosen_when_prices_are_known():
    tier = choose_tier(QWEN3_8B, priced("L4", "A100-80", "H100"), WORKLOAD)
    costs = [
        other.usd
        for other in size_model(QWEN3_8B, priced("L4", "A100-80", "H100"), WORKLOAD).tiers
        if other.quantization == "none"
    ]
    assert tier.usd == min(costs)
    assert f"the cheapest (${tier.usd:.2f})" in tier.reason
    assert tier.usd_per_million_tokens is not None


def test_a_type_without_a_price_is_listed_but_not_chosen_over_priced_ones():
    sizing = size_model(QWEN3_8B, [*priced("L4"), GPUS["B200"]], WORKLOAD)
    assert sizing.best.gpu == "L4"
    assert any(tier.gpu == "B200" for tier in sizing.tiers)


@pytest.mark.parametrize(
    ("model", "expected"),
    [(QWEN3_8B, (1, "A100-40")), (QWEN3_32B, (1, "H200")), (LLAMA_70B, (4, "A100-80"))],
)
def test_without_prices_the_smallest_gpus_with_room_for_kv_cache_are_chosen(model, expected):
    known = [gpu for gpu in GPUS.values() if gpu.name != "MI300X"]
    plain = Options(quantizations=("none",))
    tier = choose_tier(model, known, WORKLOAD, options=plain)
    assert (tier.num_gpus, tier.gpu) == expected
    assert tier.kv_bytes_per_gpu >= tier.weight_bytes_per_gpu
    assert "the smallest GPUs whose KV cache outweighs the weights (no prices are given; with" in (
        tier.reason
    )


def test_without_prices_a_deadline_takes_larger_gpus_only_as_far_as_it_needs():
    plain = Options(quantizations=("none",))
    known = list(GPUS.values())
    free = choose_tier(QWEN3_8B, known, WORKLOAD, options=plain)
    pressed = choose_tier(QWEN3_8B, known, WORKLOAD, options=plain, deadline_s=free.seconds / 4)
    assert pressed.seconds <= free.seconds / 4
    in_time = [
        tier
        for tier in size_model(QWEN3_8B, known, WORKLOAD, options=plain).tiers
        if tier.seconds <= free.seconds / 4 and tier.has_kv_room
    ]
    assert pressed.memory_bytes <= 1.1 * min(tier.memory_bytes for tier in in_time)


def test_of_one_type_the_fewest_gpu_hours_are_the_cheapest_whatever_it_costs():
    plain = Options(quantizations=("none",))
    tier = choose_tier(QWEN3_32B, [GPUS["H100"]], WORKLOAD, options=plain)
    tiers = size_model(QWEN3_32B, [GPUS["H100"]], WORKLOAD, options=plain).tiers
    assert tier.gpu_hours == min(other.gpu_hours for other in tiers)
    assert "the fewest GPU-hours" in tier.reason


SOFTCAPPED = shape(42, 3584, 14336, 16, 8, family="gemma2")


IN_AWQ = replace(QWEN3_8B, stored_quantization="awq", stored_bits=4.25)


def test_the_speed_of_what_was_never_measured_is_not_predicted():
    known = priced("L4", "A100-80", "H100")
    sizing = size_model(IN_AWQ, known, WORKLOAD, deadline_s=60, budget_usd=0.01)
    assert sizing.tiers
    assert "speed not predicted: no run with awq weights was measured" in sizing.best.reason
    for row in tiers_table(sizing, detail="all"):
        if row["fits"]:
            for name in ("hours", "usd", "completion_tokens_per_s", "gpu_hours"):
                assert row[name] is None
    json.dumps(tiers_table(sizing), allow_nan=False)
    assert sizing.best.usd_per_hour == min(
        tier.usd_per_hour
        for tier in sizing.tiers
        if tier.has_kv_room and tier.quantization == sizing.best.quantization
    )


def test_of_offloaded_weights_on_the_transformers_backend_nothing_is_predicted():
    asked = Options(backend="transformers", quantizations=("none",))
    sizing = size_model(QWEN3_32B, [GPUS["A100-40"]], WORKLOAD, options=asked)
    assert {tier.offload for tier in sizing.tiers} == {"cpu"}
    assert all(tier.seconds is None for tier in sizing.tiers)
    assert "no run of the transformers backend with offloaded weights" in sizing.best.reason


def test_weights_that_change_least_come_first_and_nf4_only_where_nothing_else_is_held():
    one = [replace(gpu, max_count=1) for gpu in priced("L4", "A100-80", "H100")]
    sizing = size_model(LLAMA_70B, one, WORKLOAD, options=Options(backend="paged"))
    assert {tier.quantization for tier in sizing.tiers} == {"fp8", "int8", "nf4"}
    assert sizing.best.quantization == "fp8"
    assert all(tier.seconds for tier in sizing.tiers)
    smallest = size_model(QWEN3_32B, [one[0]], WORKLOAD, options=Options(backend="paged"))
    assert {tier.quantization for tier in smallest.tiers} == {"nf4"}
    assert smallest.best.seconds > sizing.best.seconds


@pytest.mark.parametrize(("model", "options"), [
    (QWEN3_8B, Options(backend="transformers")), (SOFTCAPPED, Options()),
])  # fmt: skip
def test_the_transformers_backend_is_sized_by_what_it_runs_at_once(model, options):
    [tier] = size_model(model, [replace(GPUS["H100"], max_count=1)], WORKLOAD, options=replace(
        options, quantizations=("none",))).tiers  # fmt: skip
    assert tier.backend == "transformers"
    assert tier.num_running <= STATIC_NUM_SEQS
    asked = replace(options, quantizations=("none",), max_num_seqs=2 * STATIC_NUM_SEQS)
    [larger] = size_model(
        model, [replace(GPUS["H100"], max_count=1)], WORKLOAD, options=asked
    ).tiers
    assert larger.seconds < tier.seconds


def test_the_transformers_backend_that_a_job_names_is_what_is_sized():
    asked = Options(backend="transformers")
    for model in (QWEN3_8B, LLAMA_70B, SOFTCAPPED):
        tiers = size_model(model, list(GPUS.values()), WORKLOAD, options=asked).tiers
        assert {tier.backend for tier in tiers} == {"transformers"}
        assert {tier.tensor_parallel_size for tier in tiers} == {1}
    large = replace(asked, quantizations=("none",))
    parallel = replace(large, tensor_parallel_size=2)
    tier = choose_tier(LLAMA_70B, [GPUS["H200"]], WORKLOAD, options=large)
    assert (tier.offload, tier.num_gpus) == ("none", 1)
    held = choose_tier(QWEN3_32B, [GPUS["A100-40"]], WORKLOAD, options=large)
    assert (held.offload, held.backend) == ("cpu", "transformers")
    with pytest.raises(EngineConfigError, match="the transformers backend runs on one GPU"):
        choose_tier(QWEN3_8B, [GPUS["H100"]], WORKLOAD, options=parallel)


def test_a_start_takes_as_long_as_was_measured():
    results = Path(__file__).parents[1] / "benchmarks" / "results"

    def number(file, pattern):
        return float(re.search(pattern, (results / file).read_text())[1])

    first_call = number("load_h100_202611.md", r"the first call of a process \| ([\d.]+)")
    to_token = number("forecast_h100_202611.md", r"first token after \| \*\*(15[\d.]+) s")
    assert pytest.approx(to_token - 16.4 / first_call, abs=0.1) == STARTUP_S
    disk = number("load_h100_202611.md", r"disk, ours, 8 threads \| ([\d.]+)")
    assert disk * 1e9 == LOAD_BANDWIDTH
    ranks = number("ranks_h100_202611.md", r"start, 32B over two ranks \| (\d+) s")
    assert pytest.approx(ranks - 2.4) == RANKS_STARTUP_S
    pinned = number("zero_h100_202611.md", r"load \| 1\.8 s / (\d+) s")
    assert pytest.approx(65.5e9 / pinned, rel=0.01) == PINNED_LOAD_BANDWIDTH


def test_a_deadline_takes_as_many_gpus_as_it_needs():
    slow = choose_tier(QWEN3_8B, priced("L4"), WORKLOAD)
    fast = choose_tier(QWEN3_8B, priced("L4"), WORKLOAD, deadline_s=slow.seconds / 3)
    assert fast.seconds <= slow.seconds / 3
    assert fast.num_gpus > slow.num_gpus
    assert "that meets the deadline" in fast.reason


def test_a_deadline_nobody_can_meet_gives_the_fastest_and_says_how_late():
    tier = choose_tier(QWEN3_8B, [GPUS["L4"]], WORKLOAD, deadline_s=60)
    everything = size_model(QWEN3_8B, [GPUS["L4"]], WORKLOAD).tiers
    assert tier.seconds == min(t.seconds for t in everything if t.quantization == tier.quantization)
    assert "nothing meets the deadline" in tier.reason
    assert "h late" in tier.reason


def test_precision_is_given_up_only_for_what_would_not_fit_or_not_end_in_time():
    h100 = [replace(GPUS["H100"], max_count=1)]
    plain = choose_tier(QWEN3_32B, h100, WORKLOAD)
    assert plain.quantization == "none"
    assert (
        choose_tier(QWEN3_32B, h100, WORKLOAD, deadline_s=plain.seconds * 0.8).quantization == "fp8"
    )
    assert choose_tier(LLAMA_70B, h100, WORKLOAD).quantization == "fp8"


def test_the_fastest_uses_every_gpu_there_is():
    tier = choose_tier(
        QWEN3_8B, [replace(GPUS["H100"], max_count=8)], WORKLOAD, objective="fastest",
        options=Options(quantizations=("none",)),
    )  # fmt: skip
    assert tier.num_gpus == 8


def test_a_budget_that_cannot_hold_is_refused_with_both_sums():
    with pytest.raises(
        EngineConfigError, match=r"budget\.usd is 0\.01 .* raise the budget or send fewer"
    ):
        choose_tier(QWEN3_8B, priced("H100"), WORKLOAD, budget_usd=0.01)
    plain = Options(quantizations=("none",))
    cheapest = choose_tier(QWEN3_8B, priced("L4"), WORKLOAD, options=plain)
    with pytest.raises(EngineConfigError, match="move the deadline"):
        choose_tier(
            QWEN3_8B,
            priced("L4"),
            WORKLOAD,
            options=plain,
            budget_usd=cheapest.usd * 1.001,
            deadline_s=cheapest.seconds / 6,
        )


def test_too_little_memory_is_refused_with_need_have_and_the_nearest_that_fits():
    one = [replace(GPUS["H100"], max_count=1)]
    with pytest.raises(EngineConfigError) as caught:
        choose_tier(
            LLAMA_70B, one, WORKLOAD, options=Options(quantizations=("none",), backend="paged")
        )
    message = str(caught.value)
    assert "needs 141.1 GB of weights" in message
    assert "has 80.6 GB of 85.5" in message
    assert "nearest that fits: 1x H100, fp8, TP1, 1 replica" in message
    assert "\n" not in message


def test_tensor_parallel_that_does_not_divide_the_kv_heads_names_the_heads():
    one_kv_head = shape(2, 24, 48, 4, 1, vocab=331)
    for size in (2, 3):
        options = Options(tensor_parallel_size=size, replicas=1, backend="paged")
        with pytest.raises(
            EngineConfigError, match=f"tensor parallel {size} does not divide 1 KV heads"
        ):
            choose_tier(
                one_kv_head, [replace(GPUS["H100"], gpus_per_host=size)], WORKLOAD, options=options
            )


@pytest.mark.parametrize(("num_gpus", "size"), [(3, 2), (5, 4), (7, 4)])
def test_a_machine_with_an_odd_number_of_gpus_may_share_a_model_over_some_of_them(num_gpus, size):
    local = replace(GPUS["H100"], max_count=num_gpus, gpus_per_host=num_gpus)
    tier = choose_tier(LLAMA_70B, [local], WORKLOAD, options=Options(quantizations=("none",)))
    assert (tier.offload, tier.tensor_parallel_size, tier.num_gpus) == ("none", size, size)


def test_a_replica_over_several_hosts_takes_whole_ones():
    small_hosts = [replace(GPUS["H100"], gpus_per_host=3)]
    options = Options(quantizations=("none",), backend="paged")
    for tier in size_model(LLAMA_70B, small_hosts, WORKLOAD, options=options).tiers:
        assert tier.num_gpus <= 3


def test_room_that_holds_fp8_weights_but_not_the_layers_they_are_made_of_is_refused_with_both():
    replica = Replica(shape=QWEN3_14B, gpu=GPUS["L4"], quantization="fp8")
    needed = replica.loading_bytes_per_gpu
    assert replica.weight_bytes_per_gpu + 3e9 < needed

    def sized(room):
        gpu = replace(GPUS["L4"], memory_bytes=room / (1 - RESERVED_SHARE))
        options = Options(quantizations=("fp8",), tensor_parallel_size=1, replicas=1)
        return size_model(QWEN3_14B, [gpu], WORKLOAD, options=options)

    assert sized(needed + 1).tiers
    (refusal,) = sized(needed - 1e6).refusals
    assert "16.3 GB of weights and 3.5 GB of layers in bfloat16 while they are quantised" in str(
        refusal
    )


def test_a_235b_model_at_full_precision_on_h100s_is_refused_for_its_heads_and_its_size():
    sizing = size_model(QWEN3_235B, [GPUS["H100"]], WORKLOAD, options=Options(backend="paged"))
    refusal = next(r for r in sizing.refusals if r.quantization == "none" and r.num_gpus == 8)
    assert "at tensor parallel 4 a GPU needs 118.6 GB of weights" in refusal.reason
    assert "tensor parallel 8 does not divide 4 KV heads" in refusal.reason
    assert refusal.nearest == "4x H100, fp8, TP4, 1 replica"
    experts = next(r for r in sizing.refusals if r.quantization == "nf4")
    assert "bitsandbytes leaves the experts whole" in experts.reason


def test_a_checkpoint_stored_quantised_is_not_quantised_again():
    stored = replace(QWEN3_8B, stored_quantization="gptq", stored_bits=4.2)
    sizing = size_model(stored, [GPUS["T4"]], WORKLOAD)
    assert {tier.quantization for tier in sizing.tiers} == {"none"}
    assert any("stored as gptq already" in refusal.reason for refusal in sizing.refusals)


STORED = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}


@pytest.mark.parametrize("stored", [None, *STORED])
@pytest.mark.parametrize("model", ["dense 8B", "dense 70B", "experts 235B"])
def test_whatever_the_sizing_offers_a_backend_accepts(model, stored):
    sizes = {
        "dense 8B": (36, 4096, 12288, 32, 8, {}),
        "dense 70B": (80, 8192, 28672, 64, 8, {}),
        "experts 235B": (94, 4096, 12288, 64, 4, {"family": "qwen3_moe", **EXPERTS}),
    }
    *numbers, extra = sizes[model]
    written = {} if stored is None else {"quantization_config": STORED[stored]}
    sizing = size_model(shape(*numbers, **extra, **written), list(GPUS.values()), WORKLOAD)
    family = {"model_type": extra.get("family", "qwen3")}
    folder = SmallFiles(path=Path("model"), config={**family, **written})
    for tier in sizing.tiers:
        config = EngineConfig(
            model="model",
            backend=tier.backend,
            quantization=tier.quantization,
            kv_cache_dtype=tier.kv_cache_dtype,
            tensor_parallel_size=tier.tensor_parallel_size,
            offload=tier.offload if tier.backend == "zero" else "auto",
            nvme_path="/nvme" if tier.offload == "nvme" else None,
        )
        check_engine(folder, config, is_here=False)
    if stored not in (None, "fp8"):
        assert {tier.tensor_parallel_size for tier in sizing.tiers} <= {1}
    assert sizing.tiers or (model, stored) == ("experts 235B", "fp8")  # in bfloat16 on one GPU


def test_what_only_the_transformers_backend_runs_is_refused_where_paged_or_an_fp8_cache_is_asked_for():
    softcapped = shape(42, 3584, 14336, 16, 8, family="gemma2")
    stored = shape(36, 4096, 12288, 32, 8, quantization_config=STORED["gptq"])
    for model, kind in ((softcapped, "model_type gemma2"), (stored, "gptq")):
        plain = Options(quantizations=("none",), backend="paged")
        with pytest.raises(EngineConfigError, match=f"does not run {kind}; use"):
            choose_tier(model, [GPUS["H100"]], WORKLOAD, options=plain)
        small = Options(quantizations=("none",), kv_cache_dtype="fp8")
        with pytest.raises(EngineConfigError, match="no KV cache in fp8; use auto"):
            choose_tier(model, [GPUS["H100"]], WORKLOAD, options=small)


def test_a_checkpoint_in_fp8_blocks_may_run_in_fp8_and_else_takes_its_full_size():
    stored = replace(QWEN3_8B, stored_quantization="fp8", stored_bits=8.0)
    for quantization in ("none", "fp8"):
        options = Options(quantizations=(quantization,))
        whole = size_model(QWEN3_8B, [GPUS["H100"]], WORKLOAD, options=options).tiers
        assert size_model(stored, [GPUS["H100"]], WORKLOAD, options=options).tiers[0] == whole[0]


def test_a_bfloat16_model_runs_in_float16_where_bfloat16_is_missing():
    tier = size_model(QWEN3_8B, [GPUS["T4"]], WORKLOAD).tiers[0]
    assert tier.dtype == "float16"
    assert "runs in float16" in tier.notes[0]


def test_the_zero_backend_can_be_asked_for_although_the_model_fits():
    tier = choose_tier(QWEN3_8B, [GPUS["H100"]], WORKLOAD, options=Options(backend="zero"))
    assert (tier.backend, tier.offload) == ("zero", "cpu")
    assert "stay on cpu" in tier.reason


@pytest.mark.parametrize("size", [3, 5, 16])
@pytest.mark.parametrize("model", [QWEN3_8B, LLAMA_70B], ids=["8B", "70B"])
def test_a_named_number_of_gpus_that_the_heads_do_not_allow_is_refused_not_offloaded(model, size):
    options = Options(quantizations=("none",), tensor_parallel_size=size)
    refused = rf"{size}x H100, none: tensor parallel {size} does not divide 8 KV heads .* nearest"
    with pytest.raises(EngineConfigError, match=refused):
        choose_tier(model, [GPUS["H100"]], WORKLOAD, options=options)


@pytest.mark.parametrize("size", [3, 16])
def test_more_gpus_than_there_are_is_refused_with_how_many_there_are(size):
    local = replace(GPUS["H100"], max_count=2, gpus_per_host=2)
    for backend in ("auto", "paged", "zero"):
        options = Options(quantizations=("none",), tensor_parallel_size=size, backend=backend)
        with pytest.raises(EngineConfigError, match=rf"{size}x H100, none: a run may take 2 of"):
            choose_tier(QWEN3_8B, [local], WORKLOAD, options=options)


@pytest.mark.parametrize(
    ("model", "gpu", "size", "offload"),
    [(QWEN3_8B, "T4", 1, "cpu"), (LLAMA_70B, "H100", 1, "nvme"), (QWEN3_235B, "H100", 2, "nvme")],
)
def test_where_memory_is_missing_offloaded_weights_keep_to_the_named_number(
    model, gpu, size, offload
):
    options = Options(quantizations=("none",), tensor_parallel_size=size)
    tiers = size_model(model, [GPUS[gpu]], WORKLOAD, options=options).tiers
    assert [(t.num_gpus, t.replicas, t.offload) for t in tiers] == [(size, 1, offload)]
    reason = choose_tier(model, [GPUS[gpu]], WORKLOAD, options=options).reason
    assert f"the weights stay on {offload}" in reason


@pytest.mark.parametrize(
    ("gpu", "options", "message"),
    [
        ("T4", {"tensor_parallel_size": 1, "replicas": 2}, "at tensor parallel 1 a GPU needs 16.4"),
        ("T4", {"backend": "zero", "replicas": 2}, "runs one replica and 2 are asked for"),
        ("H100", {"backend": "zero", "tensor_parallel_size": 16}, "one host, of 8 GPUs"),
        ("H100", {"backend": "zero", "quantizations": ("fp8",)}, "use quantization none"),
        ("H100", {"backend": "zero", "kv_cache_dtype": "fp8"}, "no KV cache in fp8; use auto"),
    ],
)
def test_offloaded_weights_that_no_backend_would_run_are_refused(gpu, options, message):
    fixed = Options(**{"quantizations": ("none",)} | options)
    with pytest.raises(EngineConfigError, match=message):
        choose_tier(QWEN3_8B, [GPUS[gpu]], WORKLOAD, options=fixed)


def test_offloaded_weights_that_the_host_cannot_hold_are_refused_with_the_arithmetic():
    small = replace(GPUS["T4"], host_memory_bytes=8e9, nvme_bytes=10e9)
    options = Options(quantizations=("none",), backend="zero", tensor_parallel_size=1)
    with pytest.raises(EngineConfigError, match=r"16\.4 GB of weights .* there are 8\.0 and 10\.0"):
        choose_tier(QWEN3_8B, [small], WORKLOAD, options=options)


def test_no_hardware_is_refused():
    with pytest.raises(EngineConfigError, match="no GPU type"):
        choose_tier(QWEN3_8B, [], WORKLOAD)


def test_the_table_marks_one_best_row_and_is_plain_json():
    sizing = size_model(QWEN3_32B, priced("L4", "H100"), WORKLOAD)
    small, powers, everything = (
        tiers_table(sizing, detail=detail) for detail in ("smallest", "powers", "all")
    )
    assert len(small) < len(powers) < len(everything)
    for rows in (small, powers, everything):
        best = [row for row in rows if row.get("best")]
        assert len(best) == 1
        assert best[0]["reason"].startswith("1x H100") or best[0]["reason"].startswith("2x H100")
        assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert {row["num_gpus"] for row in powers if row["fits"]} <= {1, 2, 4, 8, 16}


def test_a_type_that_fits_at_no_count_is_one_row_with_the_reason():
    rows = tiers_table(
        size_model(QWEN3_235B, [GPUS["L4"]], WORKLOAD, options=Options(backend="paged"))
    )
    assert [row["quantization"] for row in rows] == ["none", "fp8", "int8", "nf4"]
    assert not any(row["fits"] for row in rows)
    assert all(row["reason"] for row in rows)
