"""Inference: prompts in, completions out.

Owns tokenisation, sampling, scheduling and the backends that run a model.
Runs with torch, transformers and the standard library alone. Never imports S3, Prefect or another room.

    flows -> tasks -> inference | storage
                      ^^^^^^^^^
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.backends import create_backend
    from inference.config import EngineConfig
    from inference.llm import LLM
    from inference.sampling import SamplingParams
    from inference.sequence import Completion, Sequence

__all__ = ["LLM", "Completion", "EngineConfig", "SamplingParams", "Sequence", "create_backend"]

_MODULES = {
    "LLM": "inference.llm",
    "Completion": "inference.sequence",
    "EngineConfig": "inference.config",
    "SamplingParams": "inference.sampling",
    "Sequence": "inference.sequence",
    "create_backend": "inference.backends",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing the room alone costs nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module 'inference' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
