"""Reads a ModelShape from a model's config.json, without opening a weight file.

So a model can be sized before it is downloaded. Decoder-only models with the usual keys are
understood: dense and mixture-of-experts, grouped KV heads, tied embeddings, a nested text_config,
weights that are stored quantised. Other kinds of layer are refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.errors import ModelError
from inference.families import is_fused, is_paged
from inference.model_shape import QUANTIZED_BYTES, ModelShape

# Families whose q, k and v carry a bias that no key announces.
_QKV_BIAS_FAMILIES = frozenset({"qwen2", "qwen2_moe"})
QK_NORM_FAMILIES = frozenset({"qwen3", "qwen3_moe"})
_UNGATED_FAMILIES = frozenset({"phi", "starcoder2", "gpt_neox", "opt", "nemotron"})
_FOUR_NORM_FAMILIES = frozenset({"gemma2", "gemma3", "gemma3_text"})
_TIED_BY_DEFAULT = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})

# A key that shows a kind of layer whose size and cache this module does not know.
_UNKNOWN_LAYERS = {
    "kv_lora_rank": "multi-head latent attention",
    "linear_num_value_heads": "linear attention layers",
    "mamba_d_state": "state-space layers",
    "ssm_state_size": "state-space layers",
}


def vocab_size_of(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model with this config.json knows; None where it does not say."""
    nested = config.get("text_config")
    size = (nested if isinstance(nested, Mapping) else config).get("vocab_size")
    return size if isinstance(size, int) else None


def read_model_shape(folder: str | Path) -> ModelShape:
    """Read the shape of the model in `folder`; only its config.json is opened.

    Raises:
        ModelError: no readable config.json, a key is missing, or the layers are of an unknown kind.
    """
    if "://" in str(folder):
        raise ModelError(
            f"{folder}: not a local folder; `nightjar stage {folder}` brings it, or give a folder with its "
            "config.json"
        )
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; a model folder holds a config.json") from error
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}); copy the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds a {type(config).__name__}, not an object of settings")
    try:
        return model_shape(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Turn a parsed config.json into a shape.

    Raises:
        ModelError: a key is missing, or the model has layers of an unknown kind.
    """
    quantization = _stored_quantization(config)
    text = config.get("text_config")
    if isinstance(text, Mapping):
        # The outer file may tie embeddings or name the dtype for the nested model.
        inherited = {
            key: config[key]
            for key in ("dtype", "torch_dtype", "tie_word_embeddings")
            if key in config
        }
        config = {**inherited, **text}
    for key, kind in _UNKNOWN_LAYERS.items():
        if config.get(key):
            raise ModelError(
                f"has {kind} ({key}), which the sizing does not know; set hardware by hand"
            )
    family = str(config.get("model_type", "unknown"))
    hidden = _positive(config, "hidden_size")
    layers = _positive(config, "num_hidden_layers")
    heads = _positive(config, "num_attention_heads")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    moe = _experts(config)
    mlp = _MlpSizes.of(config, family=family, hidden=hidden, layers=layers, moe=moe)
    return ModelShape(
        family=family,
        dtype=_dtype(config),
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_positive(config, "vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", family in _TIED_BY_DEFAULT)),
        max_model_len=int(config.get("max_position_embeddings") or 2**31),
        num_attention_params=layers * _attention(config, family, hidden, heads, kv_heads, head_dim),
        num_mlp_params=mlp.dense,
        num_expert_params=mlp.experts,
        num_other_params=_norms(family, hidden, layers, head_dim) + mlp.routers,
        intermediate_size=mlp.width_per_token,
        num_experts=moe.count if mlp.experts else 0,
        num_experts_per_token=moe.per_token if mlp.experts else 0,
        expert_size=moe.size if mlp.experts else 0,
        sliding_window=_sliding_window(config),
        is_paged=is_paged(config),
        is_fused=is_fused(config),
        stored_quantization=quantization[0],
        stored_bits=quantization[1],
    )


@dataclass(frozen=True, slots=True)
class _Experts:
    """The routed experts of one layer; `count` 0 for a dense model."""

    count: int
    per_token: int
    size: int
    shared_size: int
    has_shared_gate: bool


@dataclass(frozen=True, slots=True)
class _MlpSizes:
    """Feed-forward parameters of the whole model."""

    dense: int
    experts: int
    routers: int
    width_per_token: int

    @classmethod
    def of(
        cls, config: Mapping[str, Any], *, family: str, hidden: int, layers: int, moe: _Experts
    ) -> "_MlpSizes":
        """Sum the dense, shared and routed matrices over the layers that have them."""
        matrices = 2 if family in _UNGATED_FAMILIES else 3
        num_moe = sum(is_moe_layer(config, index) for index in range(layers)) if moe.count else 0
        num_dense = layers - num_moe
        dense_size = _positive(config, "intermediate_size") if num_dense else 0
        bias = num_dense * (hidden + (matrices - 1) * dense_size) if config.get("mlp_bias") else 0
        gate = hidden if moe.has_shared_gate else 0
        return cls(
            dense=matrices * hidden * (num_dense * dense_size + num_moe * moe.shared_size) + bias,
            experts=num_moe * moe.count * matrices * hidden * moe.size,
            routers=num_moe * (moe.count * hidden + gate),
            width_per_token=moe.per_token * moe.size + moe.shared_size if num_moe else dense_size,
        )


def _experts(config: Mapping[str, Any]) -> _Experts:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((int(config[name]) for name in names if config.get(name)), 0)
    if not count:
        return _Experts(0, 0, 0, 0, has_shared_gate=False)
    per_token = _positive(config, "num_experts_per_tok")
    size = int(config.get("moe_intermediate_size") or 0) or _positive(config, "intermediate_size")
    gated = int(config.get("shared_expert_intermediate_size") or 0)
    shared = gated or int(config.get("n_shared_experts") or 0) * size
    return _Experts(count, per_token, size, shared, has_shared_gate=bool(gated))


def is_moe_layer(config: Mapping[str, Any], index: int) -> bool:
    """Whether the layer of this number routes tokens to experts, in a model that has some."""
    if index in (config.get("mlp_only_layers") or ()):
        return False
    if index < int(config.get("first_k_dense_replace") or 0):
        return False
    return (index + 1) % int(config.get("decoder_sparse_step") or 1) == 0


def _attention(
    config: Mapping[str, Any], family: str, hidden: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    q, kv = heads * head_dim, kv_heads * head_dim
    weights = hidden * q + 2 * hidden * kv + q * hidden
    if family in _QKV_BIAS_FAMILIES:
        return weights + q + 2 * kv
    return weights + (q + 2 * kv + hidden if config.get("attention_bias") else 0)


def _norms(family: str, hidden: int, layers: int, head_dim: int) -> int:
    a_layer = (4 if family in _FOUR_NORM_FAMILIES else 2) * hidden
    if family in QK_NORM_FAMILIES:
        a_layer += 2 * head_dim
    return layers * a_layer + hidden


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    if config.get("use_sliding_window") is False:
        return None
    window = config.get("sliding_window")
    return int(window) if window else None


def _dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix(
        "torch."
    )
    return name if name in ("bfloat16", "float16", "float32") else "bfloat16"


def _stored_quantization(config: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """The method and bits a weight of a checkpoint that is quantised already."""
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return None, None
    method = str(stored.get("quant_method", "unknown"))
    if method in ("gptq", "awq"):
        bits = int(stored.get("bits") or 4)
        group = int(stored.get("group_size") or 128)
        # A group shares a 16-bit scale and a zero point of `bits`.
        return method, bits + ((16 + bits) / group if group > 0 else 0)
    if method == "bitsandbytes":
        return method, 8 * QUANTIZED_BYTES["nf4" if stored.get("load_in_4bit") else "int8"]
    if method == "fp8" and not stored.get("weight_block_size"):
        raise ModelError(
            "weights are stored as fp8 without weight_block_size, which no backend reads; "
            "use a checkpoint in blocks of 128x128, or the unquantised one with fp8"
        )
    if method == "fp8":
        return method, 8.0
    raise ModelError(
        f"weights are stored as {method!r}, whose size the sizing does not know; "
        "use the unquantised checkpoint, or one stored as fp8, gptq, awq or bitsandbytes"
    )


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{key} is {value!r}; a size of at least 1 is needed to know the model")
    return value
