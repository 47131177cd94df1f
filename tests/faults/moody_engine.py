"""A dummy engine that fails some rows in some processes: what a retry then redoes."""

import dataclasses
import random
from collections.abc import Iterable

from inference.backends.dummy import DummyBackend
from inference.config import EngineConfig
from inference.sequence import Completion, Sequence

_SHARE = 0.1


class MoodyBackend(DummyBackend):
    """One row in ten ends as an engine error, another one in every process."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._random = random.Random()
        self._spoiled: set[int] = set()

    def submit(self, sequences: Iterable[Sequence]) -> None:
        sequences = list(sequences)
        self._spoiled |= {s.seq_id for s in sequences if self._random.random() < _SHARE}
        super().submit(sequences)

    def step(self) -> list[Completion]:
        return [self._moody(completion) for completion in super().step()]

    def _moody(self, completion: Completion) -> Completion:
        if completion.seq_id not in self._spoiled:
            return completion
        return dataclasses.replace(
            completion,
            token_ids=(),
            text="",
            finish_reason="error",
            error="the logits are not finite",
            logprobs=None,
        )
