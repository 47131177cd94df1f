"""The world of ranks: joined once by each rank's process, then cut into groups that share one model.

The launcher (torchrun, or DeepSpeed's) tells each process who it is through the environment:
RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from inference.errors import EngineConfigError
from inference.tensor_parallel import TensorParallel


class Place(NamedTuple):
    """Who a process is in its world."""

    rank: int
    local_rank: int
    size: int

    @classmethod
    def from_environment(cls) -> "Place":
        """Read what the launcher said. Raises EngineConfigError without a launcher."""
        try:
            return cls(*(int(os.environ[n]) for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
        except (KeyError, ValueError) as error:
            raise EngineConfigError(
                f"{error.args[0]} is not set: ranks are started by a launcher, as in "
                f"torchrun --nproc-per-node 2 -m inference"
            ) from error


def join_world(place: Place, *, timeout_s: float) -> None:
    """Meet the other ranks; on CUDA this rank's device is current afterwards.

    Raises:
        EngineConfigError: this machine has fewer devices than ranks.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if place.local_rank >= count:
            raise EngineConfigError(
                f"local rank {place.local_rank} has no device: {count} are visible; "
                f"use a smaller engine.tensor_parallel_size"
            )
        torch.cuda.set_device(place.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def current_device() -> torch.device:
    """The device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def leave_world() -> None:
    """Close the process groups, if any. Safe to repeat."""
    if dist.is_initialized():
        dist.destroy_process_group()


def tensor_parallel_group(size: int, *, timeout_s: float) -> TensorParallel:
    """Cut the world into groups of `size` consecutive ranks and return the caller's; all ranks must call it."""
    world = dist.get_world_size()
    if world % size:
        raise EngineConfigError(
            f"{world} ranks do not divide into groups of {size}; start a multiple of it"
        )
    mine = None
    for first in range(0, world, size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
        if dist.get_rank() in ranks:
            mine = TensorParallel.of(group)
    assert mine is not None, f"rank {dist.get_rank()} of {world} is in no group"
    return mine
