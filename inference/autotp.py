"""DeepSpeed's AutoTP as we use it: which layers are partitioned, along which dimension, into what sizes.

The low-level class is given a model without weights (on the meta device) and our own process group. What is
DeepSpeed's: the choice of layer class by pattern, the sizes (KV heads stay whole, other widths may be uneven),
and for model classes that are run unmodified the layers' forward. What is ours: the patterns, reading only this
rank's slices from the files (`inference.partition`), experts and the output head, and in `FusedModel` the
forward with its all-reduces. AutoTP itself would want whole weights on every rank, would leave experts whole
(they are 3-D parameters), and would all-reduce logits of the full vocabulary.

Private API of DeepSpeed 0.19: pinned, and tested against a model that is not partitioned.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from inference.errors import EngineConfigError
from inference.tensor_parallel import TensorParallel
from inference.weight_reader import Slice

COLUMN_PATTERNS = [
    r".*\.self_attn\.[qkv]_proj\.weight$",
    r".*\.mlp\.(shared_expert\.)?(gate|up)_proj\.weight$",
]
ROW_PATTERNS = [
    r".*\.self_attn\.o_proj\.weight$",
    r".*\.mlp\.(shared_expert\.)?down_proj\.weight$",
]
WHOLE_NAMES = ("shared_expert_gate",)
"""Linears that every rank has: one output, of inputs that are the same everywhere."""


def partition_linears(model: Any, ranks: TensorParallel) -> dict[str, Slice]:
    """Replace the decoder layers' linears by AutoTP's, with this rank's shapes; the model is on meta.

    Returns:
        This rank's part of each parameter that is not whole, by name.

    Raises:
        EngineConfigError: DeepSpeed is not installed, or the model has a linear that no pattern knows.
    """
    api = _deepspeed()
    config = model.config.get_text_config()
    policy = api.AutoTPConfig(
        layer_specs=[
            api.TPLayerSpec(patterns=COLUMN_PATTERNS, partition_type=api.PartitionType.COLUMN),
            api.TPLayerSpec(patterns=ROW_PATTERNS, partition_type=api.PartitionType.ROW),
        ]
    )
    auto_tp = api.AutoTP(
        model, (), "", None, None, None, False, partition_config=policy, model_config=config
    )
    auto_tp.set_tensor_parallel_config(ranks.size, ranks.group)
    auto_tp.update_linear_policies()
    auto_tp._replace_module(model)
    parts: dict[str, Slice] = {}
    for name, module in model.named_modules():
        if isinstance(module, api.LinearLayer):
            _note(parts, name, module, 0, ranks.rank)
        elif isinstance(module, api.LinearAllreduce):
            _note(parts, name, module, 1, ranks.rank)
        elif reason := _unknown(name, module, model):
            raise EngineConfigError(
                f"engine.tensor_parallel_size is {ranks.size}: {reason}, of model_type "
                f"{config.model_type}, which no rule of tensor parallel covers; use 1"
            )
    if not parts:
        raise EngineConfigError(
            f"engine.tensor_parallel_size is {ranks.size}: no rule of tensor parallel covers any layer "
            f"of model_type {config.model_type}; use 1"
        )
    return parts


def _unknown(name: str, module: Any, model: Any) -> str:
    """Say what of a module would go wrong if its model were partitioned; empty if nothing does."""
    is_whole = name.rpartition(".")[2] in WHOLE_NAMES or module is model.get_output_embeddings()
    if isinstance(module, nn.Linear) and not is_whole:
        return f"it has a layer {name}"
    norm = getattr(module, "q_norm", None)
    if norm is not None and norm.weight.shape[0] != getattr(module, "head_dim", 0):
        return f"{name} normalises over all heads"
    return ""


def _note(parts: dict[str, Slice], name: str, module: Any, dim: int, rank: int) -> None:
    sizes = module._partition_sizes
    start = sum(sizes[:rank])
    parts[f"{name}.weight"] = Slice(dim, start, start + sizes[rank])
    if dim == 0 and module.bias is not None:
        parts[f"{name}.bias"] = parts[f"{name}.weight"]


class _Api:
    """The names of DeepSpeed's that are used."""

    def __init__(self) -> None:
        from deepspeed.module_inject.auto_tp import AutoTP
        from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType, TPLayerSpec
        from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

        self.AutoTP: Any = AutoTP
        self.AutoTPConfig: Any = AutoTPConfig
        self.PartitionType: Any = PartitionType
        self.TPLayerSpec: Any = TPLayerSpec
        self.LinearAllreduce: Any = LinearAllreduce
        self.LinearLayer: Any = LinearLayer


def _deepspeed() -> _Api:
    """Import DeepSpeed and let it use the process groups that exist."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with _quiet():
        try:
            import deepspeed
        except ImportError as error:
            raise EngineConfigError(
                "engine.tensor_parallel_size above 1 needs deepspeed; pip install 'nightjar[gpu]'"
            ) from error
        # Its shared-memory all-reduce for CPUs sums over the whole world whatever the group, and crashes under
        # launchers that do not set LOCAL_SIZE: never build it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        import torch.distributed as dist

        backend = "nccl" if "nccl" in str(dist.get_backend_config()) else "gloo"
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        return _Api()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep its greetings out of our logs; warnings stay."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
