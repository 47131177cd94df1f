"""Fetching weights from host memory without letting the bus idle: a mend of DeepSpeed 0.19's fetch for one rank.

Its own handle makes the host wait for everything on the copy stream, weights asked for ahead of time included, so
nothing is queued while the host goes on to the next module. Here a fetch waits for its own copies only; those
queued behind it run on meanwhile.
"""

from collections.abc import Iterable
from typing import Any

import torch


class Copies:
    """Copies of some parameters' weights to the device, under way on the current stream."""

    def __init__(self, params: list[Any], states: Any) -> None:
        """`states`: DeepSpeed's ZeroParamStatus."""
        self._params = params
        self._states = states
        self._event: Any = None
        for param in params:
            weights = param.ds_tensor.data
            if torch.cuda.is_available():
                weights = weights.to(torch.device("cuda"), non_blocking=True)
            param.data = weights.view(param.ds_shape)
        if torch.cuda.is_available():
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self, **options: Any) -> None:
        """Wait until these copies are done. Safe to repeat."""
        if self._event is not None:
            self._event.synchronize()
        for param in self._params:
            param.ds_status = self._states.AVAILABLE
        self._params = []


def mend_fetching() -> None:
    """Make DeepSpeed fetch so, in this process. Safe to repeat."""
    from deepspeed.runtime.zero import partition_parameters as zero

    own = zero._no_gather_coalesced
    if own.__module__ == __name__:
        return
    states = zero.ZeroParamStatus

    def fetch(params: Iterable[Any]) -> Any:
        params = sorted(params, key=lambda param: param.ds_id)
        if any(hasattr(param.ds_tensor, "ds_quant_scale") for param in params):
            return own(params)
        for param in params:
            if param.ds_status != states.NOT_AVAILABLE:
                raise RuntimeError(f"to be fetched, but is {param.ds_summary()}")
            param.ds_status = states.INFLIGHT
        return Copies(params, states)

    zero._no_gather_coalesced = fetch
