"""InFlight: a launched step, from the moment it is on its way until its tokens are taken."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from inference.sampler import Sampled
from inference.sampling import MAX_LOGPROBS
from inference.sequence import TokenLogprob
from inference.steps import Step

NO_ID = 2**31 - 1
"""In place of a most likely token, where fewer than asked for are possible."""


@dataclass(slots=True)
class InFlight:
    """A launched step. Either the device has the tokens (`result`) or the host has (`sampled`)."""

    step: Step
    slots: Any
    """The sampled sequences' slots, in row order."""

    result: Tensor | None
    event: Any
    """Recorded on CUDA once `result` is there."""

    sampled: Sampled | None
    logprobs: Tensor | None = None
    """Beside `result`, if a row asks for any: see `kernels.logprobs.merge_kernel`."""

    def token_ids(self) -> Any:
        """Wait for the step; return one int32 per sampled row, as `kernels.sampling` encodes results."""
        if self.sampled is not None:
            return np.array(self.sampled.token_ids, np.int32)
        assert self.result is not None
        if self.event is not None:
            self.event.synchronize()
        return self.result.numpy()[: len(self.slots)].copy()

    def logprob(self, index: int, token_id: int, num_top: int) -> TokenLogprob:
        """Return the log-probabilities of a row that has asked for them, once the step's tokens are there."""
        assert self.logprobs is not None, (
            f"row {index} asks for log-probabilities, its step has none"
        )
        fields = self.logprobs[index].numpy()
        values = fields.view(np.float32).tolist()
        ids = fields[1 + MAX_LOGPROBS :].tolist()
        pairs = zip(ids[:num_top], values[1 : 1 + num_top], strict=True)
        return TokenLogprob(token_id, values[0], tuple(pair for pair in pairs if pair[0] != NO_ID))
