"""Which of a model's weights go where, for the transformers backend: accelerate's options of `from_pretrained`."""

from collections.abc import Sequence
from typing import Any

import torch

from inference.config import EngineConfig
from inference.errors import EngineConfigError
from inference.offload import HOST_MEMORY_SHARE, Room, free_room
from inference.quantization import stored_method
from inference.weights import ModelFolder

_MAX_WEIGHT_SHARE = 0.85
"""Of a device's free memory, what weights may take before they are spread."""


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
    if stored_method(folder.config) == "fp8":
        return 2 * folder.num_weight_bytes  # full precision again
    text = folder.config.get("text_config") or {}
    stored = folder.config.get("dtype") or folder.config.get("torch_dtype") or text.get("dtype")
    if config.dtype == "auto" or not stored or folder.config.get("quantization_config"):
        return folder.num_weight_bytes
    sizes: list[int] = [getattr(torch, str(name)).itemsize for name in (config.dtype, stored)]
    return folder.num_weight_bytes * sizes[0] // sizes[1]
