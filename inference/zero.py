"""A model larger than its device: DeepSpeed's ZeRO-3, for inference.

The weights lie in host memory or in files on NVMe, shared out over the ranks. Hooks on every module fetch
what it needs shortly before it runs, the next ones' ahead of time, and drop it afterwards; so each forward
pass moves all weights once, and pays when it carries many rows. All ranks must run the same number of passes.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from inference.async_io import load_async_io
from inference.config import EngineConfig
from inference.deepspeed_setup import (
    at_work,
    ensure_world,
    import_deepspeed,
    require_deepspeed,
)
from inference.errors import EngineConfigError
from inference.loading import empty_model, load_model
from inference.offload import Place, check_offload, resolve_place
from inference.quantization import check_stored
from inference.swap_folder import SwapFolder
from inference.weights import ModelFolder, SmallFiles
from inference.zero_fetch import mend_fetching

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSizes:
    """Elements of a model's parameters, by what buffers are sized for."""

    total: int
    largest: int
    """Of one parameter."""

    layer: int
    """Of the largest decoder layer."""

    layer_count: int
    """Parameters of that layer that are not vectors."""

    vector: int
    """Of the largest vector: norms and biases stay on the device."""

    @classmethod
    def of(cls, model: Any) -> "ZeroSizes":
        """Count the parameters of a model, which may be on the meta device."""
        layers: dict[str, list[Any]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            match = _LAYER.search(name)
            if match:
                layers[name[: match.end()]].append(parameter)
        parameters = list(model.parameters())
        layer = max(layers.values(), key=_num_elements, default=parameters)
        return cls(
            total=_num_elements(parameters),
            largest=max(p.numel() for p in parameters),
            layer=_num_elements(layer),
            layer_count=sum(p.dim() > 1 for p in layer),
            vector=max((p.numel() for p in parameters if p.dim() < 2), default=0),
        )


class ZeroModel:
    """A loaded model and the machinery that fetches its weights."""

    def __init__(self, folder: ModelFolder, config: EngineConfig) -> None:
        """Read the weights from the folder's files into their place.

        Raises:
            ModelError: the folder is unusable.
            EngineConfigError: the weights fit nowhere, or something is not installed.
        """
        deepspeed = import_deepspeed()
        mend_fetching()
        ensure_world()
        whole = empty_model(folder, config)
        self.dtype: torch.dtype = whole.dtype
        if self.dtype == torch.float16 and not torch.cuda.is_available():
            raise EngineConfigError(
                "engine.backend is zero: DeepSpeed has no float16 on the CPU; use model.dtype bfloat16"
            )
        self.sizes = ZeroSizes.of(whole)
        self.place: Place = _agreed_place(config, self.num_weight_bytes)
        self._swap_folder: SwapFolder | None = None
        if self.place == "nvme":
            load_async_io()
            self._swap_folder = SwapFolder(str(config.nvme_path))
        swap_path = self._swap_folder.path if self._swap_folder else None
        settings = zero_settings(self.sizes, self.dtype, self.place, swap_path)
        try:
            with at_work(), _zero3_loading(settings):
                self.module: Any = load_model(folder, config, is_placed=True)
                engine = deepspeed.initialize(model=self.module, config=settings)[0]
        except BaseException:
            if self._swap_folder is not None:
                self._swap_folder.close()
            raise
        self._engine: Any = engine
        _restore_buffers(self.module, whole)
        self.module.eval()

    @property
    def num_weight_bytes(self) -> int:
        """Of all weights, wherever they are."""
        return self.sizes.total * self.dtype.itemsize

    def reset(self) -> None:
        """Drop what a pass that broke off had fetched, so that the next one starts clean."""
        from deepspeed.runtime.zero import parameter_offload

        with at_work():
            self._engine.optimizer.get_param_coordinator().release_and_reset_all(self.module)
        stack = parameter_offload.FWD_MODULE_STACK
        del stack[stack.index(self.module) + 1 :]

    def close(self) -> None:
        """Free the weights. Safe to repeat."""
        if self._engine is None:
            return
        from deepspeed.runtime.zero import parameter_offload

        with at_work():
            self._engine.destroy()
        if self.module in parameter_offload.FWD_MODULE_STACK:
            parameter_offload.FWD_MODULE_STACK.remove(self.module)
        for parameter in self.module.parameters():
            parameter.ds_tensor = None
        self._engine = self.module = None
        if self._swap_folder is not None:
            self._swap_folder.close()


def _restore_buffers(module: Any, whole: Any) -> None:
    """Give a module the buffers that no file holds, such as rotary frequencies, as they are in the model outside ZeRO.

    While ZeRO-3 loads, DeepSpeed rounds what constructors make to the weights' dtype; transformers before 5.24 lets
    it have the frequencies too, which in bf16 are then 0.4 % off, and few tokens are right.
    """
    stored = whole.state_dict().keys()
    for name, buffer in whole.named_buffers():
        if name not in stored:
            parent, _, leaf = name.rpartition(".")
            holder = module.get_submodule(parent)
            setattr(holder, leaf, buffer.to(getattr(holder, leaf).device))


def _agreed_place(config: EngineConfig, weight_bytes: int) -> Place:
    """The first rank's choice: what is free differs from one moment to the next."""
    place: list[Any] = [resolve_place(config, weight_bytes)]
    dist.broadcast_object_list(place)
    chosen: Place = place[0]
    return chosen


def zero_settings(
    sizes: ZeroSizes, dtype: torch.dtype, place: Place, swap_path: Path | None
) -> dict[str, Any]:
    """Return DeepSpeed's settings: one layer runs while the next is fetched.

    Vectors stay on the device; everything else is dropped after use. On NVMe each parameter of the layer
    that runs and of the next has a buffer in host memory, as large as the largest parameter.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": True,
        "memory_efficient_linear": False,  # else torch's linear is replaced, for the whole process
        "stage3_prefetch_bucket_size": sizes.layer,
        "stage3_max_live_parameters": 3 * sizes.layer + sizes.largest,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": sizes.vector,
    }
    if place != "none":
        zero["offload_param"] = {"device": place, "pin_memory": True}
    if place == "nvme":
        zero["offload_param"] |= {
            "nvme_path": str(swap_path),
            "buffer_count": 2 * sizes.layer_count + 1,
            "buffer_size": sizes.largest,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "aio": {"queue_depth": 32, "intra_op_parallelism": 4},
    }


@contextmanager
def _zero3_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Within, `from_pretrained` shares weights out as it reads them; transformers keeps that switch globally."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    make: Any = HfDeepSpeedConfig
    unset: Any = unset_hf_deepspeed_config
    kept = make(settings)  # only weakly referred to by transformers
    try:
        yield
    finally:
        del kept
        unset()


def check_zero(folder: SmallFiles, config: EngineConfig, *, is_here: bool = True) -> None:
    """Refuse what ZeRO cannot do, before anything is loaded; `is_here`: on this machine.

    Raises:
        EngineConfigError: with the remedy.
    """
    if is_here:
        require_deepspeed()
    check_offload(config, "zero", is_here=is_here)
    if config.quantization != "none":
        raise EngineConfigError(
            f"model.quantization is {config.quantization}: the zero backend moves weights as they are "
            f"stored; use none, or engine.backend auto"
        )
    stored = check_stored(folder, "zero")
    if stored is not None:
        raise EngineConfigError(
            f"{folder.path}: weights are stored as {stored}, which the zero backend cannot share out; "
            f"use engine.backend auto, or the unquantised model"
        )
    if config.kv_cache_dtype not in ("auto", config.dtype):
        raise EngineConfigError(
            f"engine.kv_cache_dtype is {config.kv_cache_dtype}: the zero backend keeps the model's own; "
            f"use auto, or engine.backend paged"
        )


def _num_elements(parameters: list[Any]) -> int:
    return sum(parameter.numel() for parameter in parameters)
