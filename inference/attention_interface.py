"""The paged engine's attention in a transformers model that is run unmodified, through AttentionInterface."""

import inspect
from typing import Any

from torch import Tensor

from inference.errors import EngineConfigError

ATTENTION_NAME = "nightjar_paged"


class Reference:
    """Holds the model without being a submodule or being copied with the module."""

    def __init__(self, model: Any) -> None:
        self.model = model


def refuse_what_does_not_fit(model: Any, config: Any) -> None:
    """Refuse classes that would run, and give other tokens than their own."""
    attention = [module for module in model.modules() if hasattr(module, "layer_idx")]
    if "position_ids" not in inspect.signature(type(model.base_model).forward).parameters:
        found = "counts positions itself"
    elif getattr(model, "_is_stateful", False):  # transformers' word for it
        found = "keeps more of earlier tokens than keys and values"
    elif set(model.children()) != {model.base_model, model.get_output_embeddings()}:
        found = "has an output head of several layers"
    elif any(getattr(module, "is_causal", True) is False for module in attention):
        found = "attends to later tokens"
    else:
        return
    raise EngineConfigError(
        f"engine.backend is paged: {config.model_type} {found}; use transformers"
    )


def register() -> None:
    """Teach transformers our attention; its masks are not wanted. Safe to repeat."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _attention_hook)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


def _attention_hook(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None:
        raise EngineConfigError(
            "engine.backend is paged: the model's attention makes a mask of its own; use transformers"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise EngineConfigError(
                f"engine.backend is paged: the model's attention uses {name}; use transformers"
            )
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    window = options.get("sliding_window") or 0
    model = module.nightjar_model.model
    return model.attend(module.layer_idx, query, key, value, float(scale), int(window)), None
