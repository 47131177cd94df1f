"""KVCache: keys and values of past tokens, all layers, in blocks.

K KV heads   H head dim   S tokens in one block
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What one cached token takes."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values, all layers."""
        return (
            2
            * self.num_layers
            * self.num_kv_heads
            * self.head_dim
            * self.block_size
            * self.dtype.itemsize
        )


class KVCache:
    """Per layer two tensors [blocks,K,S,H]: a block's tokens of one head lie side by side."""

    def __init__(self, shape: KVShape, num_blocks: int, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        size = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
        self._layers = [
            (
                torch.zeros(size, dtype=shape.dtype, device=device),
                torch.zeros(size, dtype=shape.dtype, device=device),
            )
            for _ in range(shape.num_layers)
        ]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one layer's keys and values."""
        return self._layers[index]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.num_blocks * self.shape.block_bytes
