"""How much of a model is in full precision while it is read: by looking at every tensor that is alive."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from inference import partition_fill


@contextmanager
def measured_full_precision() -> Iterator[list[int]]:
    """Yield the bytes of all tensors in fp32 in host memory: after each tensor that is read meanwhile, and at the end.

    Those that were there before are not counted, and no garbage is collected.
    """
    load_weights = partition_fill.load_weights
    found: list[int] = []

    def measured(*args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in load_weights(*args, **kwargs):
            yield name, tensor
            del tensor
            found.append(_full_precision_bytes())

    gc.collect()
    gc.disable()
    gc.freeze()
    partition_fill.load_weights = measured
    try:
        yield found
        found.append(_full_precision_bytes())
    finally:
        partition_fill.load_weights = load_weights
        gc.unfreeze()
        gc.enable()


def _full_precision_bytes() -> int:
    """Memory that several tensors share is counted once."""
    storages = {}
    for tensor in gc.get_objects():
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and tensor.is_cpu:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
