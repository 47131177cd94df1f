"""Weights quantised to e4m3 while they are read: no device, and no host, ever holds the model in full precision.

    files --a tensor at a time--> a layer's parameters --once it is whole--> FusedLayer in e4m3

A layer's parameters have memory from when their first bytes are read until the layer is quantised. In full precision
there are at once: the embedding, the head until the end, the layers that the files have begun and not completed, and
`MAX_AHEAD_BYTES` of what the readers are ahead.
"""

from types import ModuleType

import torch

from inference.arriving import Arriving
from inference.config import EngineConfig
from inference.errors import EngineConfigError, OutOfMemory
from inference.layers import FusedLayer, take_layer
from inference.memory import allowed_device_bytes, free_device_bytes
from inference.model import FusedModel, check_fp8_layers
from inference.model_config import read_model_shape
from inference.partition import empty_part, move_buffers
from inference.partition_fill import fill
from inference.tensor_parallel import TensorParallel
from inference.weights import SmallFiles, check_small_files


def check_room(
    folder: SmallFiles, config: EngineConfig, ranks: TensorParallel, device: torch.device
) -> None:
    """Refuse a model for which a CUDA device has no room while its weights are quantised.

    Raises:
        EngineConfigError: it never has; with the arithmetic.
        OutOfMemory: it would have, were it free of something else.
    """
    shape = read_model_shape(folder.path)
    dtype = shape.dtype if config.dtype == "auto" else config.dtype
    needed = shape.loading_bytes_per_rank(ranks.size, dtype, "fp8")
    if needed <= free_device_bytes(device):
        return
    done = shape.weight_bytes_per_rank(ranks.size, dtype, "fp8")
    allowed = allowed_device_bytes(device)
    need = (
        f"model.quantization is fp8: {done / 1e9:.1f} GB of weights on each of {ranks.size} ranks, and "
        f"{(needed - done) / 1e9:.1f} GB of layers in {dtype} while they are quantised"
    )
    if needed > allowed:
        raise EngineConfigError(
            f"{need}; the device has {allowed / 1e9:.1f} GB; use more ranks or a larger device"
        )
    raise OutOfMemory(
        f"{need}; the device has {free_device_bytes(device) / 1e9:.1f} of {allowed / 1e9:.1f} GB free; free "
        f"it of other processes"
    )


def load_quantised(
    files: Arriving,
    config: EngineConfig,
    ranks: TensorParallel,
    device: torch.device,
    ops: ModuleType,
) -> FusedModel:
    """Return this rank's part of a model on `device`, its linears in e4m3; files may still be arriving.

    Raises:
        EngineConfigError, OutOfMemory: the model cannot be run so, or as `check_room`.
        ModelError: weights are missing or of another shape than config.json says; or the error of who
            fills the folder.
    """
    if device.type == "cuda":
        check_room(check_small_files(files.folder(), config.allowed_code), config, ranks, device)
    model, parts = empty_part(files, config, ranks)
    check_fp8_layers(model)
    model.eval()
    move_buffers(model, device)
    layers: dict[int, FusedLayer] = {}

    def quantise(index: int) -> None:
        layers[index] = take_layer(model, index, ops, True, ranks)

    fill(model, parts, files, device, quantise)
    in_order = [layers[index] for index in range(len(model.base_model.layers))]
    return FusedModel(model, ops, is_fp8=True, ranks=ranks, layers=in_order)
