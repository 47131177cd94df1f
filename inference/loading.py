"""Loading: a checked model folder becomes a transformers model in evaluation mode.

Every parameter comes from the folder: a weight that is missing there is an error, never a random number.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from inference.config import EngineConfig
from inference.errors import EngineConfigError, ModelError
from inference.offload import HOST_MEMORY_SHARE, Room, free_room
from inference.weights import ModelFolder

# Share of a device's free memory that weights may take before they are spread over devices.
_MAX_WEIGHT_SHARE = 0.85


def load_tokenizer(folder: ModelFolder) -> Any:
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
        device_map: accelerate's; default: one CUDA device if there is one, several if the weights need
            it, then host memory and NVMe as `offload` allows.
        is_placed: whether something else decides where weights go.

    Raises:
        EngineConfigError: the quantization cannot work here, or the weights fit nowhere.
        ModelError: transformers has no class for the model, or weights are missing or of another shape.
    """
    import transformers

    # Its own handler prints tables of keys; what is wrong is said by the error raised here.
    transformers.utils.logging.disable_default_handler()
    loader: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {}
    if device_map is not None:
        options = {"device_map": device_map, "offload_folder": config.nvme_path}
    elif not is_placed:
        options = placement(folder, config)
    quantization_config = _quantization_config(folder, config)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    try:
        with _no_progress_bar():
            model, report = loader.from_pretrained(
                str(folder.path),
                dtype=_dtype(config),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except torch.OutOfMemoryError as error:
        raise EngineConfigError(
            f"{folder.path}: {folder.num_weight_bytes / 1e9:.1f} GB of weights do not fit the device; "
            f"use a larger one, model.quantization or engine.offload cpu"
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"{folder.path}: cannot be loaded: {_one_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            names = sorted(str(key) for key in report[kind])
            raise ModelError(
                f"{folder.path}: {len(names)} weights with {kind.replace('_', ' ')}, first {names[0]}; "
                f"the files do not belong to this config.json"
            )
    return model.eval()


def empty_model(folder: ModelFolder, config: EngineConfig) -> Any:
    """Return the model without its weights, on the meta device, to be measured.

    Raises:
        ModelError: transformers has no class for it.
    """
    import transformers

    auto_config: Any = transformers.AutoConfig
    loader: Any = transformers.AutoModelForCausalLM
    try:
        with torch.device("meta"):
            settings = auto_config.from_pretrained(str(folder.path), local_files_only=True)
            dtype = _dtype(config)
            return loader.from_config(settings, dtype=settings.dtype if dtype == "auto" else dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"{folder.path}: cannot be loaded: {_one_line(error)}") from error


def _dtype(config: EngineConfig) -> Any:
    return "auto" if config.dtype == "auto" else getattr(torch, config.dtype)


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


def placement(folder: ModelFolder, config: EngineConfig) -> dict[str, Any]:
    """Return the options of `from_pretrained` that say which weights go where.

    Raises:
        EngineConfigError: `engine.offload` allows nowhere that holds them all; with the arithmetic.
    """
    sizes = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    return accelerate_options(folder, config, sizes, free_room(config))


def accelerate_options(
    folder: ModelFolder, config: EngineConfig, device_bytes: Sequence[int], room: Room
) -> dict[str, Any]:
    """Return accelerate's options for devices with so many free bytes; see `placement`."""
    need = _loaded_bytes(folder, config)
    devices = [int(_MAX_WEIGHT_SHARE * size) for size in device_bytes]
    host = int(HOST_MEMORY_SHARE * room.host)
    if devices and (need <= devices[0] or (config.quantization != "none" and len(devices) == 1)):
        return {"device_map": {"": 0}}
    if not devices and need <= host:
        return {}
    allowed = {"cpu": 0 if devices and config.offload == "none" else host}
    memory = dict(enumerate(devices)) | allowed
    on_disk = room.disk if config.offload == "nvme" else 0
    if need > sum(memory.values()) + on_disk:
        raise EngineConfigError(
            f"{folder.path}: {need / 1e9:.1f} GB of weights; devices take {sum(devices) / 1e9:.1f} GB, "
            f"host memory {allowed['cpu'] / 1e9:.1f}, NVMe {on_disk / 1e9:.1f} "
            f"(engine.offload is {config.offload}); use model.quantization, larger devices, or "
            f"engine.offload cpu or nvme"
        )
    return {
        "device_map": "auto",
        "max_memory": memory,
        "offload_folder": config.nvme_path if config.offload == "nvme" else None,
    }


def _loaded_bytes(folder: ModelFolder, config: EngineConfig) -> int:
    """Bytes of the weights once they are loaded, before bitsandbytes shrinks them."""
    text = folder.config.get("text_config") or {}
    stored = folder.config.get("dtype") or folder.config.get("torch_dtype") or text.get("dtype")
    if config.dtype == "auto" or not stored or folder.config.get("quantization_config"):
        return folder.num_weight_bytes
    sizes: list[int] = [getattr(torch, str(name)).itemsize for name in (config.dtype, stored)]
    return folder.num_weight_bytes * sizes[0] // sizes[1]


def _quantization_config(folder: ModelFolder, config: EngineConfig) -> Any:
    """Return the bitsandbytes config for int8 or nf4, or None."""
    kind = config.quantization
    if kind == "none":
        return None
    if kind == "fp8":
        raise EngineConfigError(
            "model.quantization is fp8: needs engine.backend paged on a CUDA device"
        )
    if folder.config.get("quantization_config"):
        raise EngineConfigError(
            f"model.quantization is {kind}, but {folder.path} is quantised already; use none"
        )
    if kind == "nf4" and not torch.cuda.is_available():
        raise EngineConfigError("model.quantization is nf4: needs a CUDA device; use int8 or none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EngineConfigError(
            f"model.quantization is {kind}: needs bitsandbytes; pip install 'nightjar[gpu]'"
        )
    import transformers

    make: Any = transformers.BitsAndBytesConfig
    if kind == "int8":
        return make(load_in_8bit=True)
    return make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
