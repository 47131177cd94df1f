"""PeerSum: the sum over the ranks of one host, through memory that each of their devices reaches.

Two shots, as in vLLM's custom all-reduce and torch's symmetric memory, whose kernel it is: a device sums its share of
all buffers, then takes the other shares from its peers. For the few megabytes of a step that is faster than NCCL, which
also serves ranks on several hosts.
"""

import logging
import os
import socket
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.memory import is_out_of_memory

if TYPE_CHECKING:
    from inference.tensor_parallel import TensorParallel

logger = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float32)
_TRIED_BYTES = 4 << 20
_NUM_TRIES = 20
_MULTIPLE_BYTES = 16
"""Of each rank's share: what a thread of the kernel loads at once."""


class PeerSum:
    """A buffer of this rank's that its peers reach, and they theirs."""

    def __init__(self, buffer: Tensor, group_name: str, size: int) -> None:
        self._buffer = buffer
        self._group_name = group_name
        self._multiple = _MULTIPLE_BYTES // buffer.element_size() * size

    @classmethod
    def open(
        cls,
        ranks: "TensorParallel",
        num_elements: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_replayed: bool = True,
    ) -> "PeerSum | None":
        """Give every rank a buffer; all ranks must call it. `is_replayed`: steps are graphs, not launched one by one.

        Returns:
            None where there is nothing to gain: the ranks are on several hosts, their devices do not reach each
            other, the kernel does not know the dtype, or NCCL is as fast here.
        """
        if device.type != "cuda" or dtype not in _DTYPES or not _share_a_host(ranks):
            return None
        found: PeerSum | None = None
        try:
            found = cls(
                _buffer_of(ranks.group, num_elements, dtype, device), _name(ranks), ranks.size
            )
        except (ImportError, AttributeError, RuntimeError) as error:
            logger.info("ranks sum through NCCL: no memory that peers reach: %s", error)
        if not ranks.agree_on_least(int(found is not None)):
            return None
        assert found is not None
        return found if found._is_faster(ranks, is_replayed) else None

    def takes(self, num_elements: int, dtype: torch.dtype) -> bool:
        """Whether such a tensor can be summed here; the same on every rank, as shapes are."""
        return (
            dtype == self._buffer.dtype
            and num_elements <= self._buffer.numel()
            and num_elements % self._multiple == 0
        )

    def room(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """Return [num_rows, width] of the buffer, whose sum `of` takes without a copy; None: it does not take it."""
        if not self.takes(num_rows * width, dtype):
            return None
        return self._buffer[: num_rows * width].view(num_rows, width)

    def of(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks, the same bits on every rank; it lies in the buffer and lasts until the next one."""
        place = self._buffer[: tensor.numel()]
        if tensor.data_ptr() != place.data_ptr():
            place.copy_(tensor.flatten())
        torch.ops.symm_mem.two_shot_all_reduce_(place, "sum", self._group_name)
        return place.view(tensor.shape)

    def _is_faster(self, ranks: "TensorParallel", is_replayed: bool) -> bool:
        import torch.distributed as dist

        count = min(_TRIED_BYTES // self._buffer.element_size(), self._buffer.numel())
        tensor = self._buffer.new_zeros(count // self._multiple * self._multiple)
        try:
            ours = _microseconds(lambda: self.of(tensor), is_replayed)
            nccl = _microseconds(lambda: dist.all_reduce(tensor, group=ranks.group), is_replayed)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            logger.info("ranks sum through NCCL: what a sum takes cannot be measured: %s", error)
            ours = nccl = 0.0
        logger.info(
            "a sum of %.1f MB over %d ranks: %.0f us through peers' memory, %.0f us through NCCL",
            tensor.nbytes / 1e6,
            ranks.size,
            ours,
            nccl,
        )
        return bool(ranks.agree_on_least(int(ours < nccl)))


def _share_a_host(ranks: "TensorParallel") -> bool:
    mine = torch.tensor([zlib.crc32(socket.gethostname().encode())])
    hosts = ranks.gather(mine)
    return bool((hosts == mine).all())


def _name(ranks: "TensorParallel") -> str:
    return str(ranks.group.group_name)


def _buffer_of(group: Any, num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # The kernel needs no multicast, which not every host lets be set up.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    from torch.distributed import _symmetric_memory as symmetric

    buffer: Tensor = symmetric.empty(num_elements, dtype=dtype, device=device)
    symmetric.rendezvous(buffer, group)
    return buffer


def _microseconds(run: Callable[[], Any], is_replayed: bool) -> float:
    """Return what one of several runs takes, one after the other on the device; first ones are not counted.

    Replayed, they are timed as a graph like the steps they are part of: launched one by one, any sum would take what a
    slow host needs to launch it.
    """
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)

    def all_runs() -> None:
        for _ in range(_NUM_TRIES):
            run()

    run()
    torch.cuda.synchronize()
    timed = all_runs
    if is_replayed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            all_runs()
        timed = graph.replay
        timed()
    begin.record()
    timed()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / _NUM_TRIES
