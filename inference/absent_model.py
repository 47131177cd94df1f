"""AbsentModel: the modules that `FusedModel` takes apart, in the sizes of a config.json, on the meta device.

It holds no numbers and needs no transformers. Layers of the same kind launch the same kernels, so there are two of
each kind only; the second of two follows another layer.

T tokens   D hidden size   H head dim
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from inference.model_config import QK_NORM_FAMILIES, is_moe_layer, model_shape
from inference.model_shape import ModelShape

_MISTRAL_WINDOW = 4096
_QWEN_FULL_LAYERS = 28
"""What transformers takes when config.json says nothing."""


class AbsentModel(nn.Module):
    """Speaks to `FusedModel` as a transformers model of the Llama family does; nothing else can run it."""

    def __init__(self, config: Mapping[str, Any], dtype: str = "auto") -> None:
        """Build from a parsed config.json; `dtype` as in `EngineConfig`.

        Raises:
            ModelError: a size is missing.
        """
        super().__init__()
        shape = model_shape(config)
        if isinstance(config.get("text_config"), Mapping):
            config = config["text_config"]
        of: dict[str, Any] = {"device": "meta"}
        of["dtype"] = getattr(torch, shape.dtype if dtype == "auto" else dtype)
        kinds = _kinds(config, shape)
        self.config = _settings(config, shape, num_layers=2 * len(kinds))
        self.embedding = _Linear(shape.hidden_size, shape.vocab_size, of)
        self.layers = nn.ModuleList(_Layer(config, shape, *kind, of) for kind in kinds * 2)
        self.norm = _Norm(shape.hidden_size, of)
        self.rotary_emb = _Rotary(shape.head_dim)

    @property
    def base_model(self) -> Any:
        """All but the head."""
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head, which is as large as the embedding."""
        return self.embedding


def _settings(config: Mapping[str, Any], shape: ModelShape, *, num_layers: int) -> Any:
    """Return what the engine reads of a transformers config."""
    settings = SimpleNamespace(
        model_type=shape.family,
        hidden_size=shape.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=config.get("max_position_embeddings"),
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_token,
    )
    settings.sliding_window = config.get("sliding_window", _MISTRAL_WINDOW)  # read for mistral only
    settings.get_text_config = lambda: settings
    return settings


def _kinds(config: Mapping[str, Any], shape: ModelShape) -> list[tuple[int, bool]]:
    """Return the different (window, is_moe) of the layers."""
    windows = _windows(config, shape)
    return sorted(
        {
            (windows[index], shape.is_moe and is_moe_layer(config, index))
            for index in range(shape.num_layers)
        }
    )


def _windows(config: Mapping[str, Any], shape: ModelShape) -> list[int]:
    """Return each layer's window as its attention module has it; 0: none."""
    full = [0] * shape.num_layers
    window = config.get("sliding_window")
    if not shape.family.startswith("qwen") or not config.get("use_sliding_window") or not window:
        return full
    if shape.family == "qwen3_moe":
        return [window] * shape.num_layers
    types = config.get("layer_types")
    first = int(config.get("max_window_layers", _QWEN_FULL_LAYERS))
    return [
        window if (types[i] == "sliding_attention" if types else i >= first) else 0
        for i in range(shape.num_layers)
    ]


class _Linear(nn.Module):
    """Not torch's: that would draw numbers, for which torch imports its compiler where there are none to draw."""

    def __init__(self, inputs: int, outputs: int, of: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **of))
        self.bias = None  # would be added by torch


class _Norm(nn.Module):
    def __init__(self, width: int, of: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, **of))
        self.variance_epsilon = 1e-6


class _Rotary(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self._head_dim = head_dim

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [1,T] -> cos, sin [1,T,H]"""
        table = like.new_empty(*positions.shape, self._head_dim)
        return table, table


class _Attention(nn.Module):
    def __init__(self, shape: ModelShape, window: int, of: dict[str, Any]) -> None:
        super().__init__()
        hidden, head_dim = shape.hidden_size, shape.head_dim
        queries = shape.num_attention_heads * head_dim
        keys = shape.num_key_value_heads * head_dim
        self.q_proj = _Linear(hidden, queries, of)
        self.k_proj = _Linear(hidden, keys, of)
        self.v_proj = _Linear(hidden, keys, of)
        self.o_proj = _Linear(queries, hidden, of)
        if shape.family in QK_NORM_FAMILIES:
            self.q_norm, self.k_norm = _Norm(head_dim, of), _Norm(head_dim, of)
        self.scaling = head_dim**-0.5
        self.sliding_window = window or None


class _Mlp(nn.Module):
    def __init__(self, hidden: int, width: int, of: dict[str, Any]) -> None:
        super().__init__()
        self.gate_proj = _Linear(hidden, width, of)
        self.up_proj = _Linear(hidden, width, of)
        self.down_proj = _Linear(width, hidden, of)


class _Router(_Linear):
    def __init__(
        self, inputs: int, outputs: int, top_k: int, is_normed: bool, of: dict[str, Any]
    ) -> None:
        super().__init__(inputs, outputs, of)
        self.top_k = top_k
        self.norm_topk_prob = is_normed


class _Experts(nn.Module):
    """A block of the Qwen3-MoE kind."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, of: dict[str, Any]) -> None:
        super().__init__()
        count, hidden, width = shape.num_experts, shape.hidden_size, shape.expert_size
        self.gate = _Router(
            hidden, count, shape.num_experts_per_token, config.get("norm_topk_prob", False), of
        )
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden, **of))
        self.experts.down_proj = nn.Parameter(torch.empty(count, hidden, width, **of))


class _Layer(nn.Module):
    def __init__(
        self,
        config: Mapping[str, Any],
        shape: ModelShape,
        window: int,
        is_moe: bool,
        of: dict[str, Any],
    ) -> None:
        super().__init__()
        self.self_attn = _Attention(shape, window, of)
        self.input_layernorm = _Norm(shape.hidden_size, of)
        self.post_attention_layernorm = _Norm(shape.hidden_size, of)
        width = int(config.get("intermediate_size") or 0)
        self.mlp = _Experts(config, shape, of) if is_moe else _Mlp(shape.hidden_size, width, of)
