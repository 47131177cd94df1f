"""TensorParallel: the ranks that hold one model between them, and what they say to each other.

Every rank runs the same engine on the same sequences and makes the same decisions: only weights, heads and
the vocabulary's logits are partitioned. What is exchanged goes through this class, on a process group of its
own, so several groups can share one world (data parallel times tensor parallel).
"""

from typing import Any

import torch
from torch import Tensor

from inference.peer_sum import PeerSum


class TensorParallel:
    """One rank's view of its group. `alone` is a group of one, which exchanges nothing."""

    def __init__(self, rank: int, size: int, group: Any) -> None:
        self.rank = rank
        """This rank's place within the group, not within the world."""

        self.size = size
        self.group = group
        """A torch process group with gloo for host tensors and, on CUDA, NCCL for device tensors."""

        self._peer_sum: PeerSum | None = None

    @classmethod
    def alone(cls) -> "TensorParallel":
        """A group of one."""
        return cls(0, 1, None)

    @classmethod
    def of(cls, group: Any) -> "TensorParallel":
        """The view of the calling rank, which belongs to the group."""
        import torch.distributed as dist

        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def open_peer_sum(
        self, num_elements: int, dtype: torch.dtype, device: torch.device, *, is_replayed: bool
    ) -> None:
        """Sum tensors of up to so many elements through peers' memory from here on, where that is faster.

        All ranks must call it, before any graph is captured.
        """
        if self.size > 1:
            self._peer_sum = PeerSum.open(
                self, num_elements, dtype, device, is_replayed=is_replayed
            )

    def room(self, like: Tensor, width: int) -> Tensor | None:
        """Return where a product [T, width] of `like`'s rows is best written to be summed; None: anywhere."""
        return None if self._peer_sum is None else self._peer_sum.room(len(like), width, like.dtype)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks, the same bits on every rank.

        The tensor is overwritten, or the sum lies where the next one will: it is to be used before that.
        """
        if self.size == 1:
            return tensor
        if self._peer_sum is not None and self._peer_sum.takes(tensor.numel(), tensor.dtype):
            return self._peer_sum.of(tensor)
        import torch.distributed as dist

        dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return every rank's tensor, [size, *shape]; all must have the same shape."""
        if self.size == 1:
            return tensor[None]
        import torch.distributed as dist

        out = tensor.new_empty(self.size, *tensor.shape)
        if not tensor.is_cuda:
            dist.all_gather(list(out.unbind()), tensor.contiguous(), group=self.group)
            return out
        # Renamed in torch 2.13, with a warning under the old name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(out.flatten(), tensor.contiguous().flatten(), group=self.group)
        return out

    def exchange(self, tensor: Tensor) -> Tensor:
        """Send row block r of [size, ...] to rank r; return the blocks the ranks sent here, likewise."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        out = torch.empty_like(tensor)
        dist.all_to_all_single(out, tensor.contiguous(), group=self.group)
        return out

    def broadcast(self, data: bytes) -> bytes:
        """Return what the group's first rank gives; the others' argument is ignored."""
        if self.size == 1:
            return data
        import torch.distributed as dist

        length = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(length, group=self.group, group_src=0)
        if not int(length):
            return b""
        payload = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == 0:
            payload = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(payload, group=self.group, group_src=0)
        return payload.numpy().tobytes()

    def agree_on_least(self, value: int) -> int:
        """Return the least of the ranks' values."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        least = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.group)
        return int(least)
