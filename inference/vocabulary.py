"""What sampling asks of a row's logits as a whole, when one rank has all of them and when each has a part.

    WholeVocabulary         logits [B,V] are all here
    PartitionedVocabulary   rank r has columns [r W, r W + W) of them: [B,W], the last ones fewer

Ranks exchange a few numbers per row: a maximum, a best token, a log-sum. Only rows with top-k or top-p have
their scores gathered, to find the same floor as one rank does. Every rank gets the same answers.

    B rows   V vocabulary   W columns of a rank   C columns here (V, or at most W)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.tensor_parallel import TensorParallel


class Best(NamedTuple):
    """The best of each row; a NaN anywhere in a row makes its value NaN."""

    value_B: Tensor
    token_B: Tensor
    """Of the ones that tie, the lowest id."""


class WholeVocabulary:
    """All columns are here."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.start = 0
        """Token id of the first column here."""

    def best(self, scores_BC: Tensor) -> Best:
        """Return each row's largest score and its token."""
        return Best(scores_BC.amax(dim=-1), torch.argmax(scores_BC, dim=-1))

    def whole(self, scores_BC: Tensor) -> Tensor:
        """Return all columns, [B,V]."""
        return scores_BC

    def log_softmax(self, logits_BC: Tensor) -> Tensor:
        """Return log-probabilities over the whole vocabulary of the columns here."""
        return logits_BC.log_softmax(dim=-1)

    def top(self, values_C: Tensor, count: int) -> list[tuple[int, float]]:
        """Return the largest values of one row with their tokens, in no order."""
        best = torch.topk(values_C, min(count, len(values_C)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def value_of(self, token_id: int, values_C: Tensor) -> float:
        """Return one row's value of one token."""
        return float(values_C[token_id])


class PartitionedVocabulary(WholeVocabulary):
    """Some columns are here; ranks ask each other, so every rank must make the same calls."""

    def __init__(self, size: int, ranks: TensorParallel) -> None:
        super().__init__(size)
        self._ranks = ranks
        self.width = -(-size // ranks.size)
        """W: columns of every rank but the last ones."""

        self.start, self.stop = columns_of(size, ranks.rank, ranks.size)

    def padded(self, scores_BC: Tensor) -> Tensor:
        """Return [B,W], with -inf where this rank has no column."""
        missing = self.width - scores_BC.shape[-1]
        return F.pad(scores_BC, (0, missing), value=-torch.inf) if missing else scores_BC

    def best(self, scores_BC: Tensor) -> Best:
        """Return each row's largest score and its token."""
        scores_BW = self.padded(scores_BC)
        token_B = scores_BW.argmax(dim=-1) + self.start
        values_NB = self._ranks.gather(scores_BW.amax(dim=-1))
        tokens_NB = self._ranks.gather(token_B)
        value_B = values_NB.amax(dim=0)
        is_best_NB = (values_NB == value_B) | values_NB.isnan()
        return Best(value_B, tokens_NB.where(is_best_NB, self.size).amin(dim=0))

    def whole(self, scores_BC: Tensor) -> Tensor:
        """Return all columns, [B,V]."""
        parts_NBW = self._ranks.gather(self.padded(scores_BC))
        return parts_NBW.transpose(0, 1).flatten(1)[:, : self.size]

    def log_softmax(self, logits_BC: Tensor) -> Tensor:
        """Return log-probabilities over the whole vocabulary of the columns here."""
        sums_NB = self._ranks.gather(self.padded(logits_BC).logsumexp(dim=-1))
        return logits_BC - sums_NB.logsumexp(dim=0)[:, None]

    def top(self, values_C: Tensor, count: int) -> list[tuple[int, float]]:
        """Return the largest values of one row with their tokens, in no order."""
        if not count:
            return []
        best = torch.topk(self.padded(values_C), min(count, self.width))
        values = self._ranks.gather(best.values).flatten().tolist()
        tokens = self._ranks.gather(best.indices + self.start).flatten().tolist()
        pairs = [(t, v) for t, v in zip(tokens, values, strict=True) if t < self.size]
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:count]

    def value_of(self, token_id: int, values_C: Tensor) -> float:
        """Return one row's value of one token."""
        owner = token_id // self.width
        here = (
            values_C[token_id - self.start] if owner == self._ranks.rank else values_C.new_zeros(())
        )
        return float(self._ranks.gather(here)[owner])


def columns_of(size: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Return the first and last + 1 token that a rank has the logits of."""
    width = -(-size // num_ranks)
    return min(size, rank * width), min(size, rank * width + width)
