"""A model's config.json alone gives its parameters, weight bytes and KV bytes."""

import json

import pytest

from inference.errors import ModelError
from inference.model_config import model_shape, read_model_shape
from inference.model_shape import MAX_AHEAD_BYTES


def qwen3(layers, hidden, ffn, heads, kv_heads, *, tied=False, **extra):
    return {
        "model_type": "qwen3_moe" if "num_experts" in extra else "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40960,
        "torch_dtype": "bfloat16",
        **extra,
    }


def moe(size):
    return {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": size}


def llama(layers, hidden, ffn, heads, kv_heads, vocab, **extra):
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **extra,
    }


# Published counts of distinct parameters (a tied head once), in billions.
PUBLISHED = {
    "Qwen3-0.6B": (qwen3(28, 1024, 3072, 16, 8, tied=True), 0.596),
    "Qwen3-1.7B": (qwen3(28, 2048, 6144, 16, 8, tied=True), 1.721),
    "Qwen3-4B": (qwen3(36, 2560, 9728, 32, 8, tied=True), 4.022),
    "Qwen3-8B": (qwen3(36, 4096, 12288, 32, 8), 8.191),
    "Qwen3-14B": (qwen3(40, 5120, 17408, 40, 8), 14.768),
    "Qwen3-32B": (qwen3(64, 5120, 25600, 64, 8), 32.762),
    "Qwen3-30B-A3B": (qwen3(48, 2048, 6144, 32, 4, **moe(768)), 30.532),
    "Qwen3-235B-A22B": (qwen3(94, 4096, 12288, 64, 4, **moe(1536)), 235.094),
    "Llama-3.1-8B": (llama(32, 4096, 14336, 32, 8, 128256), 8.030),
    "Llama-3.3-70B": (llama(80, 8192, 28672, 64, 8, 128256), 70.554),
    "Mistral-7B-v0.3": (
        llama(32, 4096, 14336, 32, 8, 32768, model_type="mistral", sliding_window=None),
        7.248,
    ),
    "Mixtral-8x7B": (
        llama(
            32,
            4096,
            14336,
            32,
            8,
            32000,
            model_type="mixtral",
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        46.703,
    ),
    "Qwen2.5-72B": (llama(80, 8192, 29568, 64, 8, 152064, model_type="qwen2"), 72.706),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_match_the_published_ones_within_a_tenth_of_a_percent(name):
    config, billions = PUBLISHED[name]
    assert model_shape(config).num_params / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        qwen3(2, 64, 96, 4, 2),
        qwen3(2, 64, 96, 4, 2, tied=True, attention_bias=True),
        qwen3(3, 64, 96, 4, 2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[1]),
        llama(2, 64, 96, 4, 2, 512, attention_bias=True, mlp_bias=True),
        llama(2, 64, 96, 4, 2, 512, model_type="mistral", head_dim=16),
        llama(2, 64, 96, 4, 4, 512, model_type="qwen2"),
        llama(2, 64, 96, 4, 2, 512, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
        llama(
            2, 64, 96, 4, 4, 512, model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32, shared_expert_intermediate_size=48,
        ),
    ],
    ids=["qwen3", "qwen3 tied with bias", "qwen3_moe", "llama with biases", "mistral", "qwen2", "mixtral", "qwen2_moe"],
)  # fmt: skip
def test_the_count_is_exactly_that_of_the_model_class(config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = dict(config)
    parsed = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(parsed)
    model.tie_weights()
    assert model_shape(config).num_params == sum(p.numel() for p in model.parameters())


def test_an_8b_model_takes_the_bytes_its_quantisation_says():
    shape = model_shape(PUBLISHED["Qwen3-8B"][0])
    whole = 2 * 151936 * 4096 + shape.num_other_params
    linear = shape.num_params - whole
    assert shape.weight_bytes() == 2 * shape.num_params
    assert shape.weight_bytes("float32") == 4 * shape.num_params
    assert shape.weight_bytes("float16", "fp8") == linear + 2 * whole
    assert shape.weight_bytes("bfloat16", "int8") == linear + 2 * whole
    assert shape.weight_bytes("bfloat16", "nf4") == linear * 0.5625 + 2 * whole


def test_bitsandbytes_leaves_experts_at_full_size_and_fp8_does_not():
    shape = model_shape(PUBLISHED["Qwen3-30B-A3B"][0])
    assert shape.weight_bytes(quantization="nf4") > 0.94 * shape.weight_bytes()
    assert shape.weight_bytes(quantization="fp8") < 0.53 * shape.weight_bytes()


def test_kv_bytes_follow_the_kv_heads_not_the_query_heads():
    shape = model_shape(PUBLISHED["Qwen3-8B"][0])
    assert shape.kv_bytes_per_token() == 147_456
    assert shape.kv_bytes_per_token("fp8") == 73_728
    assert shape.kv_bytes_per_token("float32") == 294_912


@pytest.mark.parametrize(("name", "billions"), [("Qwen3-30B-A3B", 2.7), ("Qwen3-235B-A22B", 20.7)])
def test_active_parameters_of_a_moe_model_are_a_fraction_of_all(name, billions):
    shape = model_shape(PUBLISHED[name][0])
    assert shape.num_active_params / 1e9 == pytest.approx(billions, rel=0.03)


def test_ranks_hold_their_part_of_the_layers_and_the_whole_embedding():
    shape = model_shape(PUBLISHED["Qwen3-32B"][0])
    embedding = 2 * 151936 * 5120
    two = shape.weight_bytes_per_rank(2)
    assert two == pytest.approx((shape.weight_bytes() - embedding) / 2 + embedding, rel=1e-3)
    assert 2 * two > shape.weight_bytes()


@pytest.mark.parametrize(("name", "num_ranks"), [("Qwen3-32B", 1), ("Qwen3-235B-A22B", 4)])
def test_a_rank_that_quantises_to_fp8_holds_what_is_done_and_a_few_layers(name, num_ranks):
    shape = model_shape(PUBLISHED[name][0])
    done = shape.weight_bytes_per_rank(num_ranks, quantization="fp8")
    layer = shape.weight_bytes() / shape.num_layers / num_ranks
    most = shape.loading_bytes_per_rank(num_ranks, quantization="fp8")
    assert done + MAX_AHEAD_BYTES + 1.8 * layer < most < done + MAX_AHEAD_BYTES + 2 * layer
    assert shape.loading_bytes_per_rank(num_ranks) == shape.weight_bytes_per_rank(num_ranks)


def test_readers_cannot_be_further_ahead_than_all_layers():
    shape = model_shape(PUBLISHED["Qwen3-0.6B"][0])
    most = shape.loading_bytes_per_rank(1, quantization="fp8")
    assert most <= shape.weight_bytes(quantization="fp8") + shape.weight_bytes()


def test_a_tied_head_becomes_a_slice_of_its_own_when_it_is_split():
    shape = model_shape(PUBLISHED["Qwen3-0.6B"][0])
    embedding = 2 * 151936 * 1024
    layers = shape.weight_bytes() - embedding
    assert shape.weight_bytes_per_rank(2) == pytest.approx(layers / 2 + 1.5 * embedding, rel=1e-3)


def test_a_nested_text_config_is_the_one_that_counts():
    inner = PUBLISHED["Qwen3-8B"][0]
    outer = {"model_type": "some_vl", "vision_config": {"hidden_size": 768}, "text_config": inner}
    assert model_shape(outer) == model_shape(inner)


def test_a_sliding_window_is_noted_only_when_it_is_in_use():
    config = llama(2, 64, 96, 4, 2, 512, sliding_window=4096)
    assert model_shape(config).sliding_window == 4096
    assert model_shape(config | {"use_sliding_window": False}).sliding_window is None


def test_weights_stored_quantised_are_sized_as_they_are_loaded():
    config = PUBLISHED["Qwen3-8B"][0]
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    fp8 = model_shape(config | {"quantization_config": blocks})
    gptq = model_shape(
        config | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    )
    # Blocks of fp8 become full precision again, or what the engine quantises itself.
    assert fp8.weight_bytes() == model_shape(config).weight_bytes()
    assert fp8.weight_bytes(quantization="fp8") == model_shape(config).weight_bytes(
        quantization="fp8"
    )
    assert gptq.stored_bits == pytest.approx(4.156, abs=0.001)
    assert gptq.weight_bytes() < fp8.weight_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"quantization_config": {"quant_method": "quip"}}, "'quip'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8 without weight_block_size"),
        ({"num_experts": 8}, "num_experts_per_tok is None"),
    ],
)
def test_what_cannot_be_sized_is_refused_by_name(change, named):
    with pytest.raises(ModelError, match=named):
        model_shape(PUBLISHED["Qwen3-8B"][0] | change)


def test_a_folder_without_a_usable_config_is_refused_with_its_path(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json: No such file"):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds a list"):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-8B"][0]))
    assert read_model_shape(tmp_path).num_layers == 36
