"""One rank's part of a model: built without weights, cut to this rank's shapes, then filled from its slices.

No rank ever reads or holds more than its own part. What is partitioned:

    attention and MLP linears   as DeepSpeed's AutoTP cuts them (`inference.autotp`)
    shared experts              as an MLP, by AutoTP; the gate in front of them is whole
    experts                     every rank has all of them, each cut along its intermediate size; one all-reduce
                                follows
    output head                 rows of the vocabulary, unless it is tied to the embedding
    all else                    whole on every rank

E experts   I intermediate size of an expert   D hidden size
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inference.arriving import Arriving
from inference.autotp import partition_linears
from inference.config import EngineConfig
from inference.errors import EngineConfigError
from inference.families import EXPERT_MODEL_TYPES
from inference.heads import check_heads
from inference.lazy_weights import tensor_names
from inference.loading import dtype_name, empty_model
from inference.partition_fill import fill, give_memory
from inference.quantization import check_quantization
from inference.tensor_parallel import TensorParallel
from inference.vocabulary import columns_of
from inference.weight_reader import Slice, stored_dtype
from inference.weights import SmallFiles, check_small_files


def load_partition(
    files: Arriving, config: EngineConfig, ranks: TensorParallel, device: torch.device
) -> Any:
    """Return this rank's part of a causal language model, on `device`, in evaluation mode.

    The rank's memory is allocated at once, and filled from each weight file as soon as it is whole.

    Raises:
        EngineConfigError: the model cannot be partitioned so.
        ModelError: weights are missing or of another shape than config.json says; or the error of who
            fills the folder.
    """
    model, parts = empty_part(files, config, ranks)
    allocate(model, device)
    fill(model, parts, files, device)
    return model.eval()


def empty_part(
    files: Arriving, config: EngineConfig, ranks: TensorParallel
) -> tuple[Any, dict[str, Slice]]:
    """Return the model without weights, in this rank's shapes, and what of each parameter that is not whole is here.

    Raises:
        As `load_partition`.
    """
    folder = check_small_files(files.folder(), config.allowed_code)
    check_quantization(folder, config, "paged")
    model = empty_model(folder, _with_dtype(folder, config, files))
    _untie(model, files)
    text = model.config.get_text_config()
    check_heads(
        ranks.size,
        num_heads=text.num_attention_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
    )
    return model, cut(model, ranks) if ranks.size > 1 else {}


def _with_dtype(folder: SmallFiles, config: EngineConfig, files: Arriving) -> EngineConfig:
    """Where config.json does not say what element type the model is of, its weights do."""
    if config.dtype != "auto" or folder.config.get("dtype") or folder.config.get("torch_dtype"):
        return config
    stored = stored_dtype(next(iter(files.weight_files())))
    name: Any = "auto" if stored is None else dtype_name(stored)
    return replace(config, dtype=name)


def _untie(model: Any, files: Arriving) -> None:
    """Give the head memory of its own where the files have one beside the embedding that it is said to be."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return
    of_model = model.named_modules()
    names = {f"{name}.weight" for name, module in of_model if module is head or module is embedding}
    if names <= set(tensor_names(files)):
        head.weight = _meta(head.weight, tuple(head.weight.shape))


def cut(model: Any, ranks: TensorParallel) -> dict[str, Slice]:
    """Give a model on the meta device this rank's shapes; return what of each parameter is here, by name.

    Raises:
        EngineConfigError: part of the model is of a kind that cannot be partitioned.
    """
    experts = _cut_experts(model, ranks)
    return partition_linears(model, ranks) | experts | _cut_head(model, ranks)


def _cut_experts(model: Any, ranks: TensorParallel) -> dict[str, Slice]:
    """Give 3-D experts this rank's shapes: gate and up [E,2I,D] each cut along I, down [E,D,I] along I."""
    parts = {}
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            continue
        model_type = model.config.get_text_config().model_type
        if model_type not in EXPERT_MODEL_TYPES:
            raise EngineConfigError(
                f"engine.tensor_parallel_size is {ranks.size}: experts of model_type {model_type} "
                f"cannot be partitioned yet, those of {', '.join(EXPERT_MODEL_TYPES)} can; use 1"
            )
        num_experts, width_2i, hidden = module.gate_up_proj.shape
        width = width_2i // 2
        if width % ranks.size:
            raise EngineConfigError(
                f"engine.tensor_parallel_size is {ranks.size}: does not divide the experts' "
                f"intermediate size {width}"
            )
        here = width // ranks.size
        part = Slice(0, ranks.rank * here, ranks.rank * here + here)
        parts[f"{name}.gate_up_proj"] = part
        parts[f"{name}.down_proj"] = part
        module.gate_up_proj = _meta(module.gate_up_proj, (num_experts, 2 * here, hidden))
        module.down_proj = _meta(module.down_proj, (num_experts, hidden, here))
        module.intermediate_dim = here
        module.register_forward_hook(lambda module, inputs, out: ranks.all_reduce(out))
    return parts


def _cut_head(model: Any, ranks: TensorParallel) -> dict[str, Slice]:
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        return {}  # the embedding is whole on every rank; the head is a view of it
    vocab, hidden = head.weight.shape
    part = Slice(0, *columns_of(vocab, ranks.rank, ranks.size))
    name = next(name for name, module in model.named_modules() if module is head)
    head.weight = _meta(head.weight, (part.stop - part.start, hidden))
    if head.bias is None:
        return {f"{name}.weight": part}
    head.bias = _meta(head.bias, (part.stop - part.start,))
    return {f"{name}.weight": part, f"{name}.bias": part}


def _meta(like: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device="meta"), requires_grad=False)


def allocate(model: Any, device: torch.device) -> None:
    """Put real memory under every parameter."""
    for parameter in model.parameters():
        give_memory(parameter, device)
    move_buffers(model, device)


def move_buffers(model: Any, device: torch.device) -> None:
    """Move what is computed, not read: rotary frequencies."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
