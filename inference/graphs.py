"""GraphPool: CUDA graphs by key, captured on first use, in one memory pool."""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from inference.memory import is_out_of_memory

logger = logging.getLogger(__name__)


class GraphPool:
    """Runs a launch sequence as it is, or as a graph captured under its key."""

    def __init__(self, *, is_on: bool, has_collectives: bool = False) -> None:
        """`has_collectives`: launches speak to other ranks, whose library polls events in a thread of its own."""
        self.is_on = is_on
        self.is_warm = False
        """Whether the run has begun, in which no graph should be missing."""

        self._error_mode = "thread_local" if has_collectives else "global"
        self._graphs: dict[Hashable, Any] = {}
        self._uncapturable: set[Hashable] = set()
        self._pool: Any = None

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def lacks(self, key: Hashable) -> bool:
        """Whether this key's launches would be captured when they are first run."""
        return self.is_on and key not in self._graphs and key not in self._uncapturable

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Capture between runs meanwhile, where it holds nothing up."""
        self.is_warm, was_warm = False, self.is_warm
        try:
            yield
        finally:
            self.is_warm = was_warm

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run launches as they are meanwhile."""
        self.is_on, was_on = False, self.is_on
        try:
            yield
        finally:
            self.is_on = was_on

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Do what `launch` does. The key must hold every number that is baked into its launches."""
        if not self.is_on or key in self._uncapturable:
            launch()
            return
        graph = self._graphs.get(key)
        if graph is None:
            if self.is_warm:
                logger.info("a graph is captured in the middle of the run: %s", key)
            launch()  # compiles kernels and picks algorithms, which must not happen during capture
            self._capture(key, launch)
            return
        graph.replay()

    def _capture(self, key: Hashable, launch: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=self._error_mode):
                launch()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # Some modules of others wait for the device; they run as they are.
            logger.warning("%s cannot be captured and is launched each time: %s", key, error)
            self._uncapturable.add(key)
            return
        self._graphs[key] = graph


_SIZES = (8, 16, 32, 64, 128, 192, 256)
"""Sizes below multiples of 128. Matrix products cost steps, not slopes: measured, 320 rows cost what 384 do."""


def padded(count: int, limit: int) -> int:
    """Round a token or row count up to one that graphs are captured for, at most `limit`."""
    if count <= _SIZES[-1]:
        size = _SIZES[bisect_left(_SIZES, count)]
    else:
        size = -(-count // _step(count)) * _step(count)
    return min(size, limit)


def around(count: int, limit: int) -> tuple[int, int]:
    """Return the padded sizes next to a count, below and above; the same twice where it is one itself."""
    above = padded(count, limit)
    if count <= _SIZES[-1]:
        below = _SIZES[max(0, bisect_right(_SIZES, count) - 1)]
    else:
        below = count // _step(count) * _step(count)
    return min(below, above), above


def _step(count: int) -> int:
    return 128 if count <= 1024 else 256 if count <= 4096 else 1024


def sizes(largest: int) -> list[int]:
    """Return every padded size up to `largest`."""
    found = []
    count = 1
    while count <= largest:
        found.append(padded(count, largest))
        count = found[-1] + 1
    return found
