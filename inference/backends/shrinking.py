"""Less for ranks that are out of memory: what they are started again with.

`paged` takes smaller steps and a KV cache a tenth smaller; `zero` half of the batch that was too large, and one
sequence that is too large alone has failed.
"""

import dataclasses
import logging

from inference.backends.base import BackendInfo
from inference.config import EngineConfig
from inference.errors import OutOfMemory
from inference.sequence import Completion, Sequence

logger = logging.getLogger(__name__)

_MAX_SHRINKS = 3
_MAX_BATCH_SHRINKS = 10
"""A batch of zero's 1,024 rows, halved, is one row then."""

MOST_SHRINKS = max(_MAX_SHRINKS, _MAX_BATCH_SHRINKS)
"""Of one replica, whatever its backend."""

_AUTO_STEP_TOKENS = 8192
"""What `auto` is at least on any device: where it is less, the first shrinking changes nothing."""

_SPARE_BYTES = 2**30
"""Left alone beside the KV cache by ranks that start again before any has said how large the cache was."""


class Shrinking:
    """The settings that a replica's ranks have, smaller each time one is out of memory."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.num_shrinks = 0

    def shrink(self, error: OutOfMemory, built: BackendInfo | None) -> int | None:
        """Make the settings smaller; or else return the one sequence that is too large alone, and has to go.

        Args:
            error: what the ranks ended with.
            built: what they had built; None: they were not ready yet.

        Raises:
            OutOfMemory: steps cannot be smaller, or were made smaller too often.
        """
        too_large: int | None = None
        if self.config.backend != "zero":
            self.config = self._with_smaller_steps(error, built)
        elif len(error.seq_ids) != 1:
            self.config = self._with_smaller_batches(error, built)
        elif self.num_shrinks == _MAX_BATCH_SHRINKS:
            raise error
        else:
            too_large = error.seq_ids[0]
        self.num_shrinks += 1
        return too_large

    def _with_smaller_steps(self, error: OutOfMemory, built: BackendInfo | None) -> EngineConfig:
        """Return the settings with steps half as large and some memory spare. Raises OutOfMemory."""
        config = self.config
        limit = config.max_num_batched_tokens
        if limit == "auto":
            limit = _AUTO_STEP_TOKENS
        fewest = 1 if config.max_num_seqs == "auto" else config.max_num_seqs
        if built is not None:
            config = dataclasses.replace(config, max_model_len=built.max_model_len)
            fewest = built.max_num_seqs
        smaller = max(fewest, limit // 2)
        if self.num_shrinks == _MAX_SHRINKS or smaller >= limit:
            raise OutOfMemory(
                f"{error}; steps were made smaller {self.num_shrinks} times, to {limit} tokens, and cannot be "
                f"smaller than engine.max_num_seqs, {fewest}; lower it, or use more ranks"
            ) from error
        logger.warning(
            "out of memory: the ranks start again with at most %d tokens a step instead of %d",
            smaller,
            limit,
        )
        tenth = _SPARE_BYTES if built is None else built.memory.get("kv_cache", 0) // 10
        return dataclasses.replace(
            config,
            max_num_batched_tokens=smaller,
            max_num_seqs=config.max_num_seqs if built is None else fewest,
            spare_bytes=config.spare_bytes + tenth,
        )

    def _with_smaller_batches(self, error: OutOfMemory, built: BackendInfo | None) -> EngineConfig:
        """Return the settings with half the batch that a rank had. Raises OutOfMemory."""
        if built is None:  # no batch is under way: it is the weights
            raise error
        limit = self.config.max_num_seqs
        limit = built.max_num_seqs if limit == "auto" else limit
        num_rows = len(error.seq_ids) or limit
        smaller = num_rows // 2
        if self.num_shrinks == _MAX_BATCH_SHRINKS or smaller == 0:
            raise OutOfMemory(
                f"{error}; batches were made smaller {self.num_shrinks} times, to {limit} sequences; "
                f"lower engine.max_model_len or engine.max_num_batched_tokens, or use a larger device"
            ) from error
        logger.warning(
            "%s: the ranks start again with at most %d sequences at once instead of %d",
            error,
            smaller,
            num_rows,
        )
        return dataclasses.replace(self.config, max_num_seqs=smaller)


def failed_alone(sequence: Sequence) -> Completion:
    """Return the end of a sequence that ranks are out of memory with although it is the only one."""
    num_tokens = len(sequence.prompt_token_ids)
    logger.warning("out of memory with one sequence, of %d prompt tokens: it fails", num_tokens)
    reason = (
        f"out of memory with this sequence alone ({num_tokens} prompt tokens); "
        f"lower engine.max_model_len or use a larger device"
    )
    return Completion(sequence.seq_id, (), "", "error", reason)
