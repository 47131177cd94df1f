"""Quantised weights: what the job and the checkpoint ask for, whether it can run here, and how it is loaded.

model.quantization   fp8     the paged backend's own
                     int8    bitsandbytes, weights and activations; a text may depend on its batch
                     nf4     bitsandbytes, weights only
stored as            fp8     in blocks, as Qwen publishes: made full precision again while it is read
                     bitsandbytes   loaded as it is
                     gptq, awq      loaded by transformers through gptqmodel
"""

import importlib.util
import logging
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch

from inference.config import EngineConfig
from inference.errors import EngineConfigError
from inference.tier import BITSANDBYTES
from inference.weights import SmallFiles

# Where quantisers wrote their settings before config.json had a place for them.
_OLD_SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_PACKAGES = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",)}


def stored_method(model_config: Mapping[str, Any]) -> str | None:
    """Return how a checkpoint's weights are quantised already, None if they are not."""
    stored = model_config.get("quantization_config")
    return str(stored.get("quant_method", "unknown")) if isinstance(stored, Mapping) else None


def check_quantization(
    folder: SmallFiles, config: EngineConfig, backend: str, *, is_here: bool = True
) -> None:
    """Refuse what cannot run, before anything is loaded; `is_here`: on this machine.

    Raises:
        EngineConfigError: with the remedy.
    """
    kind, stored = config.quantization, check_stored(folder, backend)
    if stored is not None and kind != "none" and not (kind == "fp8" and stored == "fp8"):
        raise EngineConfigError(
            f"model.quantization is {kind}, but {folder.path} is stored as {stored} already; use none, "
            f"or the unquantised model"
        )
    if kind == "fp8" and backend != "paged":
        raise EngineConfigError(
            "model.quantization is fp8: needs engine.backend paged on a CUDA device"
        )
    if config.tensor_parallel_size > 1 and (kind in BITSANDBYTES or stored not in (None, "fp8")):
        raise EngineConfigError(
            f"engine.tensor_parallel_size is {config.tensor_parallel_size}: ranks cannot share weights "
            f"quantised as {stored or kind}; use 1, or a model that is unquantised or stored as fp8 in blocks"
        )
    if is_here:
        _check_packages(folder, kind, stored)


def _check_packages(folder: SmallFiles, kind: str, stored: str | None) -> None:
    if stored in _PACKAGES:
        packages = _PACKAGES[stored]
        remedy = f"pip install {' '.join(packages)}, or use the unquantised model"
        _require(f"{folder.path} is stored as {stored}", packages, remedy)
    if kind in BITSANDBYTES or stored == "bitsandbytes":
        what = (
            f"model.quantization is {kind}"
            if stored is None
            else f"{folder.path} is stored as {stored}"
        )
        _require(what, ("bitsandbytes",), "pip install 'nightjar[gpu]'")


def check_stored(folder: SmallFiles, backend: str) -> str | None:
    """Return how a checkpoint's weights are quantised already, None if they are not.

    Raises:
        EngineConfigError: the backend cannot read them; with the remedy.
    """
    stored = stored_method(folder.config)
    if stored is None:
        _refuse_unsaid(folder)
        return None
    settings = folder.config["quantization_config"]
    if stored == "fp8":
        if not settings.get("weight_block_size"):
            raise EngineConfigError(
                f"{folder.path}: weights are stored as fp8 without weight_block_size, which is not known "
                f"here; use a checkpoint in blocks of 128x128, or the unquantised one with fp8"
            )
    elif stored in _PACKAGES and backend != "transformers":
        raise EngineConfigError(
            f"{folder.path}: weights are stored as {stored}, which the {backend} backend cannot read; "
            f"use engine.backend transformers, or the unquantised model with model.quantization fp8"
        )
    elif stored not in (*_PACKAGES, "bitsandbytes"):
        raise EngineConfigError(
            f"{folder.path}: weights are stored as {stored}, which no backend reads; use the unquantised "
            f"checkpoint, or one stored as fp8 in blocks, gptq, awq or bitsandbytes"
        )
    return stored


def _refuse_unsaid(folder: SmallFiles) -> None:
    """Refuse weights that are quantised although config.json, which every loader reads, does not say so."""
    text = folder.config.get("text_config")
    if isinstance(text, Mapping) and text.get("quantization_config"):
        raise EngineConfigError(
            f"{folder.path}: text_config has a quantization_config of its own, which no backend reads; use the "
            f"unquantised checkpoint"
        )
    for name, kind in _OLD_SETTINGS.items():
        if (folder.path / name).exists():
            raise EngineConfigError(
                f"{folder.path}: {name} says that weights are stored as {kind}, and config.json has no "
                f"quantization_config; add one with its settings and quant_method {kind}, or use the unquantised model"
            )


def _require(what: str, packages: tuple[str, ...], remedy: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineConfigError(f"{what}: needs {' and '.join(missing)}; {remedy}")


def quantization_options(folder: SmallFiles, config: EngineConfig) -> Any:
    """Return the quantization_config for `from_pretrained`, None for none; what is refused, is refused before."""
    import transformers

    library: Any = transformers
    stored = stored_method(folder.config)
    if stored == "fp8":
        # Its products in fp8 are kernels fetched from a hub at run time.
        block = folder.config["quantization_config"]["weight_block_size"]
        return library.FineGrainedFP8Config(weight_block_size=tuple(block), dequantize=True)
    if config.quantization not in BITSANDBYTES and stored != "bitsandbytes":
        return None
    _import_bitsandbytes()
    if stored is not None:
        return None
    if config.quantization == "int8":
        return library.BitsAndBytesConfig(load_in_8bit=True)
    return library.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=_compute_dtype(folder, config),
    )


def prints_aside(folder: SmallFiles) -> AbstractContextManager[Any]:
    """Within, what gptqmodel prints goes to the standard error: the standard output is the command's answer."""
    is_talkative = stored_method(folder.config) in _PACKAGES
    return redirect_stdout(sys.stderr) if is_talkative else nullcontext()


def is_bitsandbytes(model: Any) -> bool:
    """Whether a loaded model's linears are bitsandbytes' own: no plain weights."""
    return getattr(model, "quantization_method", None) == "bitsandbytes"


def looks_at_values(model: Any) -> bool:
    """Whether a loaded model's products wait for the device in the middle: int8 looks for outliers on the host."""
    kept = getattr(model.config, "quantization_config", None)
    return is_bitsandbytes(model) and bool(getattr(kept, "load_in_8bit", True))


def use_portable_products(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    It would round scales to bf16, refuse sizes that 32 does not divide, in mid-run, and so give other texts on
    other CPUs.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _compute_dtype(folder: SmallFiles, config: EngineConfig) -> torch.dtype:
    text = folder.config.get("text_config") or {}
    name: Any = config.dtype
    if name == "auto":
        name = folder.config.get("dtype") or folder.config.get("torch_dtype") or text.get("dtype")
    dtype: torch.dtype = getattr(torch, str(name or "bfloat16").removeprefix("torch."))
    return dtype


def _import_bitsandbytes() -> None:
    """Import it without the package `kernels`, through which it would fetch code from a hub.

    Its warnings are about that, and about a cast that is what int8 means.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with _hidden("kernels"):
        import bitsandbytes  # noqa: F401


@contextmanager
def _hidden(name: str) -> Any:
    """Within, importing the module fails."""
    kept = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if kept is None:
            del sys.modules[name]
        else:
            sys.modules[name] = kept
