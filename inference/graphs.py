"""GraphPool: CUDA graphs by key, captured on first use, in one memory pool."""

from collections.abc import Callable, Hashable
from typing import Any

import torch


class GraphPool:
    """Runs a launch sequence as it is, or as a graph captured under its key."""

    def __init__(self, *, is_on: bool) -> None:
        self.is_on = is_on
        self._graphs: dict[Hashable, Any] = {}
        self._pool: Any = None

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Do what `launch` does. The key must hold every number that is baked into its launches."""
        if not self.is_on:
            launch()
            return
        graph = self._graphs.get(key)
        if graph is None:
            launch()  # compiles kernels and picks algorithms, which must not happen during capture
            graph = self._capture(launch)
            self._graphs[key] = graph
            return
        graph.replay()

    def _capture(self, launch: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            launch()
        return graph


def padded(count: int, limit: int) -> int:
    """Round a token or row count up to one that graphs are captured for; at most an eighth is padding above 64."""
    if count <= 8:
        size = 8
    elif count <= 64:
        size = -(-count // 16) * 16
    elif count <= 512:
        size = -(-count // 32) * 32
    elif count <= 1024:
        size = -(-count // 64) * 64
    elif count <= 2048:
        size = -(-count // 128) * 128
    else:
        size = -(-count // 512) * 512
    return min(size, limit) if count <= limit else count


def sizes(largest: int) -> list[int]:
    """Return every padded size up to `largest`."""
    found = []
    count = 1
    while count <= largest:
        found.append(padded(count, largest))
        count = found[-1] + 1
    return found
