"""Loading: a checked model folder becomes a transformers model in evaluation mode.

Every parameter comes from the folder: a weight that is missing there is an error, never a random number.

Two ways: transformers' own (the plain one, used on CPU and for quantised weights), and through
`inference.lazy_weights`: in parallel through pinned buffers on one CUDA device, and on any device while
files are still arriving.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from inference.arriving import Arriving
from inference.config import EngineConfig
from inference.errors import EngineConfigError, ModelError
from inference.lazy_weights import LazyWeights
from inference.load_weights import make_buffers_ready
from inference.placement import placement
from inference.quantization import prints_aside, quantization_options, use_portable_products
from inference.weights import (
    ModelFolder,
    SmallFiles,
    check_model_folder,
    check_small_files,
    indexed_bytes,
)

# Share of a device's free memory that weights may take before they are spread over devices.
_MAX_WEIGHT_SHARE = 0.85


def load_tokenizer(folder: SmallFiles) -> Any:
    """Return the folder's tokenizer.

    Raises:
        ModelError: there is none, or it needs code of its own.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder.path), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder.path}: no usable tokenizer: {_one_line(error)}") from error


def load_model(
    folder: ModelFolder,
    config: EngineConfig,
    device_map: Mapping[str, Any] | str | None = None,
    *,
    is_placed: bool = False,
) -> Any:
    """Return the folder's causal language model, on its device or devices, in evaluation mode.

    Args:
        folder: from `check_model_folder`.
        config: dtype, quantization, offload and nvme_path are read.
        device_map: accelerate's; default: see `inference.placement`.
        is_placed: whether something else decides where weights go.

    Raises:
        EngineConfigError: the weights fit nowhere.
        ModelError: transformers has no class for the model, or weights are missing or of another shape.
    """
    options: dict[str, Any] = {}
    if device_map is not None:
        options = {"device_map": device_map, "offload_folder": config.nvme_path}
    elif not is_placed:
        options = placement(folder, config)
    quantization_config = quantization_options(folder, config)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    loader: Any = _transformers().AutoModelForCausalLM
    try:
        with _no_progress_bar(), prints_aside(folder):
            model, report = loader.from_pretrained(
                str(folder.path), **_options(config), use_safetensors=True, **options
            )
    except torch.OutOfMemoryError as error:
        raise _too_big(folder.path, folder.num_weight_bytes) from error
    except _UNLOADABLE as error:
        raise ModelError(f"{folder.path}: cannot be loaded: {_one_line(error)}") from error
    return _checked(model, report, folder.path)


def expect_weights(
    files: Arriving, config: EngineConfig, device: torch.device, *, num_ranks: int
) -> None:
    """Have ready what `load_arriving`, or else `partition_fill`, will read files through.

    Called before the tokenizer is read and the model's class imported, which takes longer.
    """
    is_ours = num_ranks > 1 or config.quantization == "fp8"
    if device.type == "cuda" and (is_ours or not _wants_plain_way(files, config, device)):
        make_buffers_ready(device, _num_weight_bytes(files) // num_ranks)


def load_arriving(files: Arriving, config: EngineConfig, device: torch.device) -> Any:
    """Return the causal language model of a folder on one device; files may still be arriving there.

    Raises:
        As `load_model`; and the error of who fills the folder.
    """
    if _wants_plain_way(files, config, device):
        folder = check_model_folder(files.wait_for_all(), config.allowed_code)
        return load_model(folder, config, {"": device} if device.type == "cuda" else None)
    path = files.folder()
    transformers = _transformers()
    try:
        model_config = transformers.AutoConfig.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True
        )
        loader = transformers.AutoModelForCausalLM._model_mapping[type(model_config)]
        with LazyWeights(files, device=device) as weights, _no_progress_bar():
            try:
                model, report = loader.from_pretrained(
                    None,
                    config=model_config,
                    state_dict=weights.state(),
                    device_map={"": device},
                    **_options(config),
                )
            except _UNLOADABLE:
                weights.raise_error()
                raise
            weights.finish()
    except torch.OutOfMemoryError as error:
        raise _too_big(path, _num_weight_bytes(files)) from error
    except _UNLOADABLE as error:
        raise ModelError(f"{path}: cannot be loaded: {_one_line(error)}") from error
    return _checked(model, report, path)


_UNLOADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError)


def _wants_plain_way(files: Arriving, config: EngineConfig, device: torch.device) -> bool:
    """Whether transformers should read the files itself, once all are there."""
    if files.is_done and device.type != "cuda":
        return True
    model_config = check_small_files(files.folder(), config.allowed_code).config
    is_quantised = config.quantization != "none" or "quantization_config" in model_config
    # Without it transformers looks for the dtype in the weights, which may not be there yet.
    has_dtype = bool(model_config.get("dtype") or model_config.get("torch_dtype"))
    if is_quantised or (config.dtype == "auto" and not has_dtype):
        return True
    # What is stored in a wider dtype is held beside what it becomes; transformers holds less of it.
    return device.type == "cuda" and _num_weight_bytes(files) > (
        _MAX_WEIGHT_SHARE * torch.cuda.mem_get_info(device)[0]
    )


def _transformers() -> Any:
    import transformers

    # Its own handler prints tables of keys; what is wrong is said by the error raised here.
    transformers.utils.logging.disable_default_handler()
    return transformers


def _options(config: EngineConfig) -> dict[str, Any]:
    return {
        "dtype": "auto" if config.dtype == "auto" else getattr(torch, config.dtype),
        "trust_remote_code": False,
        "local_files_only": True,
        "output_loading_info": True,
    }


def _checked(model: Any, report: dict[str, Any], path: Path) -> Any:
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            names = sorted(str(key) for key in report[kind])
            raise ModelError(
                f"{path}: {len(names)} weights with {kind.replace('_', ' ')}, first {names[0]}; "
                f"the files do not belong to this config.json"
            )
    use_portable_products(model)
    return model.eval()


def _too_big(path: Path, num_weight_bytes: int) -> EngineConfigError:
    return EngineConfigError(
        f"{path}: {num_weight_bytes / 1e9:.1f} GB of weights do not fit the device; "
        f"use a larger one, more ranks, model.quantization or engine.backend zero"
    )


def _num_weight_bytes(files: Arriving) -> int:
    """As many as the index says; of a single file that is on its way, 0."""
    folder = files.folder()
    if size := indexed_bytes(folder):
        return size
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def empty_model(folder: SmallFiles, config: EngineConfig) -> Any:
    """Return the model with parameters on the meta device and buffers, such as rotary frequencies, real.

    Raises:
        ModelError: transformers has no class for it.
    """
    from accelerate import init_empty_weights

    library = _transformers()
    try:
        found = library.AutoConfig.from_pretrained(
            str(folder.path), trust_remote_code=False, local_files_only=True
        )
        if hasattr(found, "quantization_config"):
            del found.quantization_config  # how the files are stored is the filler's business
        wanted = found.dtype or torch.float32
        if config.dtype != "auto":
            wanted = getattr(torch, config.dtype)
        with init_empty_weights(include_buffers=False):
            model = library.AutoModelForCausalLM.from_config(found, dtype=wanted)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder.path}: no usable model: {type(error).__name__}") from error
    model.tie_weights()
    return model


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers' bars out of ours."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
