"""ZeroBackend: static batches through a model larger than the device; see `inference.zero`.

A forward pass moves every weight to the device once, whatever it computes, so a batch takes as many rows as
their keys and values fit, and long prompts run in several passes.

Ranks share one copy of the weights and have rows of their own. Each is given every sequence and keeps those
dealt to it; each runs one pass a step, in step with the others, since a pass gathers every rank's part of the
weights; a rank without rows runs a pass over one token. After a pass they exchange what they finished, so
all know what is left and all stop together.
"""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from inference.backends.checks import check_sequence
from inference.backends.row import Row
from inference.backends.static_backend import (
    StaticBackend,
    StaticLimits,
    resolve,
)
from inference.backends.static_batch import StaticBatch
from inference.config import EngineConfig
from inference.deepspeed_setup import at_work
from inference.errors import EngineConfigError, OutOfMemory
from inference.memory import free_device_bytes
from inference.sequence import Completion, Sequence
from inference.weights import ModelFolder
from inference.zero import ZeroModel, check_zero

logger = logging.getLogger(__name__)

_DEFAULT_MAX_NUM_SEQS = {"cpu": 32, "cuda": 1024}
_DEFAULT_MAX_NUM_BATCHED_TOKENS = {"cpu": 8_192, "cuda": 16_384}
_CPU_CACHE_TOKENS = 65_536
_CACHE_SHARE = 0.8
"""Of what is free beside weights in flight: the rest is what a layer computes, and copies of a growing cache."""


class _Report(NamedTuple):
    """What a rank did in one step."""

    completions: list[Completion]
    num_waiting: int
    num_prompt_tokens: int
    num_completion_tokens: int


class ZeroBackend(StaticBackend):
    """One rank of ZeRO-3 inference, or the only one."""

    name = "zero"

    def __init__(self, config: EngineConfig) -> None:
        """Load this rank's share of the weights; all ranks must be at it at the same time.

        Raises:
            ModelError: the model folder is unusable.
            EngineConfigError: the settings cannot work on this model or machine.
        """
        super().__init__(config)
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._dealt: dict[
            int, tuple[int, int]
        ] = {}  # seq_id -> (rank, most tokens) of what is unfinished
        self._load_of = [0] * self._num_ranks
        self._num_waiting_elsewhere = 0

    @property
    def num_unfinished(self) -> int:
        """Sequences submitted and not yet returned, on all ranks."""
        return len(self._dealt)

    @property
    def num_waiting(self) -> int:
        """Sequences submitted and not yet started; what other ranks have is known after the next step."""
        return super().num_waiting + self._num_waiting_elsewhere

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences, the same on all ranks; each keeps its own. See `check_sequence` for refusals."""
        for sequence in sequences:
            check_sequence(sequence, self._dealt, self._info.max_model_len)
            rank = min(range(self._num_ranks), key=self._load_of.__getitem__)
            num_tokens = len(sequence.prompt_token_ids) + sequence.sampling.max_tokens
            self._dealt[sequence.seq_id] = rank, num_tokens
            self._load_of[rank] += num_tokens
            if rank == self._rank:
                super().submit([sequence])
            else:
                self._num_waiting_elsewhere += 1

    def step(self) -> list[Completion]:
        """Run one pass on every rank; return what finished on any.

        Raises:
            EngineFault: the model failed for a reason other than memory.
            OutOfMemory: a rank of several is out of memory; the others cannot go on without it.
        """
        if not self._dealt:
            return []
        finished: list[Completion] = []
        for rank, report in enumerate(self._exchange(self._pass())):
            finished += report.completions
            if rank == 0:
                self._num_waiting_elsewhere = 0
            if rank != self._rank:
                self._num_waiting_elsewhere += report.num_waiting
                self._stats.num_prompt_tokens += report.num_prompt_tokens
                self._stats.num_completion_tokens += report.num_completion_tokens
        for completion in finished:
            rank, num_tokens = self._dealt.pop(completion.seq_id)
            self._load_of[rank] -= num_tokens
        return finished

    def close(self) -> None:
        """Free the model and forget everything submitted. Safe to repeat."""
        super().close()
        self._dealt.clear()
        self._num_waiting_elsewhere = 0
        self._zero.close()

    def _exchange(self, mine: _Report) -> list[_Report]:
        """Return every rank's report, by rank."""
        found: list[Any] = [mine] * self._num_ranks
        if self._num_ranks > 1:
            dist.all_gather_object(found, mine, group=self._control)
        return found

    def _pass(self) -> _Report:
        """Run one pass of this rank: its batch's, or an idle one."""
        stats = self._stats
        prompt_tokens, completion_tokens = stats.num_prompt_tokens, stats.num_completion_tokens
        completions: list[Completion] = []
        if self._batch is not None or super().num_waiting:
            completions = super().step()
        elif self._num_ranks > 1:
            self._idle()
        return _Report(
            completions,
            super().num_waiting,
            stats.num_prompt_tokens - prompt_tokens,
            stats.num_completion_tokens - completion_tokens,
        )

    @torch.inference_mode()
    def _idle(self) -> None:
        """Take part in the others' pass, which gathers this rank's share of the weights."""
        with at_work():
            self._model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self._device))

    def _forward(self, batch: StaticBatch) -> Tensor | None:
        with at_work():
            return super()._forward(batch)

    def _shrink(self, batch: StaticBatch) -> list[Row]:
        if self._num_ranks > 1:
            raise OutOfMemory(
                f"rank {self._rank} of {self._num_ranks}: out of memory with {len(batch.rows)} sequences of "
                f"{batch.num_columns} tokens",
                seq_ids=(row.sequence.seq_id for row in batch.rows),
            )
        self._zero.reset()
        return super()._shrink(batch)

    def _check(self, folder: ModelFolder, config: EngineConfig) -> None:
        check_zero(folder, config)
        world = dist.get_world_size() if dist.is_initialized() else 1
        if config.tensor_parallel_size != world:
            raise EngineConfigError(
                f"engine.tensor_parallel_size is {config.tensor_parallel_size}: the zero backend shares its "
                f"weights over as many ranks, and there are {world}; start it through the launcher"
            )

    def _load(self, folder: ModelFolder, config: EngineConfig) -> tuple[Any, torch.device]:
        self._zero = ZeroModel(folder, config)
        self._control: Any = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        is_cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else "cpu"
        return self._zero.module, torch.device(device)

    def _batch_limits(self, config: EngineConfig, max_model_len: int) -> StaticLimits:
        kind = "cuda" if self._device.type == "cuda" else "cpu"
        return StaticLimits(
            max_num_seqs=resolve(config.max_num_seqs, _DEFAULT_MAX_NUM_SEQS[kind]),
            max_pass_tokens=resolve(
                config.max_num_batched_tokens, _DEFAULT_MAX_NUM_BATCHED_TOKENS[kind]
            ),
            max_cache_tokens=self._max_cache_tokens(),
        )

    def _max_cache_tokens(self) -> int:
        """Tokens whose keys and values fit the device beside the weights in flight."""
        if self._device.type != "cuda":
            return _CPU_CACHE_TOKENS
        free = free_device_bytes(self._device)
        sizes, item = self._zero.sizes, self._zero.dtype.itemsize
        in_flight = (3 * sizes.layer + sizes.largest) * item
        text = self._model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        token_bytes: int = 2 * text.num_hidden_layers * heads * head_dim * item
        room = int(_CACHE_SHARE * (free - in_flight))
        return max(1, room // token_bytes)

    def _memory(self) -> dict[str, int]:
        where = {"none": "weights", "cpu": "host_weights", "nvme": "nvme_weights"}
        return {where[self._zero.place]: self._zero.num_weight_bytes // dist.get_world_size()}
