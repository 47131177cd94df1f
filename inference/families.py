"""What the engine can do with a kind of model, by its config.json; no torch here, so that sizing asks too."""

from collections.abc import Mapping
from typing import Any

from inference.tier import BITSANDBYTES

FUSED_MODEL_TYPES = frozenset({"qwen3", "qwen3_moe", "qwen2", "llama", "mistral"})
"""Whose decoder layer is written on the fused operations, which fp8 needs."""

FUSED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_BY_LONGEST_ROW = frozenset({"longrope", "dynamic"})
"""Whose frequencies depend on the longest row of a batch."""

EXPERT_MODEL_TYPES = ("qwen2_moe", "qwen3_moe")
"""Whose experts ranks can share."""

UNCUT_MODEL_TYPES = frozenset(
    {"glm", "glm4", "gpt_neox", "olmo2", "olmo3", "persimmon", "phi", "phi3", "starcoder2"}
)
"""Whose linears no rule of tensor parallel covers (fused q, k and v, other names), or whose norms are over all heads."""

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")

UNSUPPORTED_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
PAGED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

# Families that scale logits or attention scores also where their config.json does not say so.
_SCALED_MODEL_TYPES = frozenset({"gemma2", "cohere", "cohere2", "gpt_oss"})

# Families whose tokens choose experts before they attend, which no trial without values sees.
_ROUTED_ATTENTION_MODEL_TYPES = frozenset({"jetmoe"})


def rope_types(rope: Mapping[str, Any]) -> set[str]:
    """Return the rope types of all layers; parameters may be nested, one set per type of layer."""
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return {str(part.get("rope_type") or part.get("type")) for part in (rope, *nested)}


def is_paged(config: Mapping[str, Any]) -> bool:
    """Whether the paged backend can run a text model of this config.json; the transformers backend can anyway."""
    return not paged_refusal(config)


def paged_refusal(config: Mapping[str, Any]) -> str:
    """Say what of a text model of this config.json the paged backend cannot do; empty if that shows nothing."""
    for name in (*UNSUPPORTED_SCALES, "attn_logit_softcapping"):
        if config.get(name) not in (None, 1):
            return f"scales its logits or attention scores ({name}), which it cannot do yet"
    if config.get("model_type") in _SCALED_MODEL_TYPES:
        return "scales its logits or attention scores, which it cannot do yet"
    if _has_quantised_head(config):
        return "has its output head quantised"
    if config.get("model_type") in _ROUTED_ATTENTION_MODEL_TYPES:
        return "has attention heads that are experts"
    if others := set(config.get("layer_types") or ()) - PAGED_LAYER_TYPES:
        return f"has layers of type {sorted(others)}"
    if by_longest_row := rope_types(_rope(config)) & ROPE_BY_LONGEST_ROW:
        return f"has rope_type {min(by_longest_row)}, whose frequencies depend on the longest row of a batch"
    return ""


def partition_refusal(config: Mapping[str, Any]) -> str:
    """Say what of a text model of this config.json ranks cannot share; empty if that shows nothing."""
    kind = config.get("model_type")
    if kind in UNCUT_MODEL_TYPES:
        return f"no rule of tensor parallel covers layers of model_type {kind}"
    if any(config.get(name) for name in _EXPERT_COUNTS) and kind not in EXPERT_MODEL_TYPES:
        return (
            f"experts of model_type {kind} cannot be partitioned yet, those of "
            f"{', '.join(EXPERT_MODEL_TYPES)} can"
        )
    return ""


def is_fused(config: Mapping[str, Any], quantization: str = "none") -> bool:
    """Whether the paged backend runs a text model of this config.json, its weights quantised so, on fused operations."""
    return is_fused_family(config) and _can_be_joined(config, quantization)


def is_fused_family(config: Mapping[str, Any]) -> bool:
    """Whether the layers of a text model of this config.json are written on the fused operations."""
    rope = _rope(config)
    return (
        config.get("model_type") in FUSED_MODEL_TYPES
        and config.get("hidden_act", "silu") == "silu"
        and (rope.get("rope_type") or rope.get("type") or "default") in FUSED_ROPE_TYPES
        and config.get("partial_rotary_factor") in (None, 1)
    )


def _can_be_joined(config: Mapping[str, Any], quantization: str) -> bool:
    """Whether weights can be laid side by side: of bitsandbytes' those in four bits, in layers without experts."""
    stored = _stored_by_bitsandbytes(config)
    if stored is None and quantization not in BITSANDBYTES:
        return True
    if config.get("model_type") in EXPERT_MODEL_TYPES:
        return False
    if stored is None:
        return quantization == "nf4"
    computes_in = str(stored.get("bnb_4bit_compute_dtype") or "float32")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    same = computes_in.removeprefix("torch.") == dtype.removeprefix("torch.")
    return bool(stored.get("load_in_4bit")) and same


def _has_quantised_head(config: Mapping[str, Any]) -> bool:
    """Whether bitsandbytes has stored the output head too: who names what it leaves whole must name that."""
    stored = _stored_by_bitsandbytes(config) or {}
    whole = [str(name) for name in stored.get("llm_int8_skip_modules") or ()]
    is_tied = bool(config.get("tie_word_embeddings"))
    return bool(whole) and not is_tied and not any("lm_head" in name for name in whole)


def _stored_by_bitsandbytes(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    stored = config.get("quantization_config")
    is_so = isinstance(stored, Mapping) and stored.get("quant_method") == "bitsandbytes"
    return stored if is_so else None


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}
