"""What the paged engine refuses of a kind of model, said before weights are staged or loaded."""

from collections.abc import Mapping
from typing import Any

from inference.config import EngineConfig
from inference.errors import EngineConfigError
from inference.families import is_fused_family, paged_refusal, partition_refusal
from inference.weights import SmallFiles


def check_family(folder: SmallFiles, config: EngineConfig) -> None:
    """Refuse models that the paged engine cannot run, or not with these settings.

    Of families that have no fused layers the class is built without weights, which takes transformers some seconds to
    import and little memory.

    Raises:
        EngineConfigError: with the remedy.
        ModelError: transformers has no class for the model.
    """
    text = {**folder.config, **(folder.config.get("text_config") or {})}
    refuse_by_config(text)
    if config.tensor_parallel_size > 1 and (reason := partition_refusal(text)):
        raise EngineConfigError(
            f"engine.tensor_parallel_size is {config.tensor_parallel_size}: {reason}; use 1"
        )
    if is_fused_family(text):
        return
    if config.quantization == "fp8":
        raise EngineConfigError(
            f"model.quantization is fp8: not available for model_type {text.get('model_type')}; use none"
        )
    from inference.family_trial import refuse_by_trial  # torch, and below transformers
    from inference.loading import empty_model

    refuse_by_trial(empty_model(folder, config))


def refuse_by_config(text: Mapping[str, Any]) -> None:
    """Refuse what a text model's config.json already shows.

    Raises:
        EngineConfigError: with the remedy.
    """
    if reason := paged_refusal(text):
        raise EngineConfigError(
            f"engine.backend is paged: {text.get('model_type')} {reason}; use transformers"
        )
