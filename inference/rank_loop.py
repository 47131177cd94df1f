"""The loop every rank of a replica runs: the same sequences, the same steps, in the same order.

The first rank hears the replica's process, tells the others what it heard, and reports. Once a second at least
the ranks meet, so a rank that is gone is noticed by those that have nothing to do.
"""

import json
import time
from typing import Any, Protocol

from inference.backends.base import Backend
from inference.rank_messages import (
    Message,
    completion_to_json,
    info_to_json,
    sequence_from_json,
    stats_to_json,
)
from inference.sequence import Completion
from inference.tensor_parallel import TensorParallel

_IDLE_S = 1.0
_REPORT_S = 0.25


class Link(Protocol):
    """What the first rank needs of a `RankLink`."""

    def send(self, message: Message) -> None:
        """Send one message."""

    def take(self, timeout_s: float) -> list[Message]:
        """Return what has come, waiting for something up to `timeout_s`."""


def serve(
    backend: Backend, ranks: TensorParallel, link: Link | None, *, waited_s: float = 0.0
) -> None:
    """Run until the replica says stop.

    Args:
        backend: this rank's part of the engine.
        ranks: this rank and its peers.
        link: to the replica's process; only the first rank's is used.
        waited_s: how long this rank waited for weight files while it loaded.

    Raises:
        InferenceError: from the backend.
        RuntimeError: a peer is gone.
    """
    reporter = None
    if ranks.rank == 0 and link is not None:
        link.send({"kind": "ready", "info": info_to_json(backend.info), "waited_s": waited_s})
        reporter = _Reporter(backend, link)
    while True:
        heard: list[Message] = []
        if ranks.rank == 0 and link is not None:
            heard = link.take(0 if backend.num_unfinished else _IDLE_S)
        for message in _tell_all(ranks, heard):
            if message["kind"] == "stop":
                return
            backend.submit([sequence_from_json(values) for values in message["sequences"]])
            if reporter is not None:
                reporter.num_received += len(message["sequences"])
        completions = backend.step() if backend.num_unfinished else []
        if reporter is not None:
            reporter.report(completions)


def _tell_all(ranks: TensorParallel, heard: list[Message]) -> list[Message]:
    """Give every rank the first one's messages."""
    if ranks.size == 1:
        return heard
    data = ranks.broadcast(json.dumps(heard).encode() if heard else b"")
    return json.loads(data) if data else []


class _Reporter:
    """Tells the replica's process what was finished, and now and then that there is progress."""

    def __init__(self, backend: Backend, link: Link) -> None:
        self._backend = backend
        self._link = link
        self._last_at = 0.0
        self.num_received = 0

    def report(self, completions: list[Completion]) -> None:
        """Report a step."""
        now = time.monotonic()
        if not completions and now - self._last_at < _REPORT_S:
            return
        self._last_at = now
        message: dict[str, Any] = {
            "kind": "progress",
            "completions": [completion_to_json(completion) for completion in completions],
            "stats": stats_to_json(self._backend.stats),
            "num_waiting": self._backend.num_waiting,
            "num_received": self.num_received,
        }
        self._link.send(message)
