"""ModelRunner: runs the scheduler's steps on the device, a step or two ahead of who reads the results.

A step is two launches: the body (embedding to hidden states, sized by tokens) and the head (logits and
sampling, sized by rows). On CUDA both are captured graphs, NCCL's collectives included; a graph's key holds
every number baked into it. All work is on one stream, so blocks may be given away as soon as the step that read them is launched.

    T tokens   D hidden size   R rows that sample
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.batch import BatchLimits, Plan, buffer_size, cut, make_batch, views_of
from inference.graphs import GraphPool, around, padded, sizes
from inference.in_flight import InFlight
from inference.model import PagedModel
from inference.planner import Planner, Slots
from inference.sampler import Sampled, SamplerRow, sample
from inference.sampling import MAX_LOGPROBS
from inference.sampling_needs import GREEDY, SamplingNeeds
from inference.slot_params import SlotParams
from inference.steps import Running, Step
from inference.tally import TokenTally

ROW_COPY_BYTES = 128 << 10
"""Of the block table, that are copied as soon as one row is on its own."""

NUM_BUFFERS = 4
"""Host copies of the packed buffer: more than steps are ever in flight, so none is written while it is read."""

RowOf = Callable[[Running], SamplerRow]


class ModelRunner:
    """Owns the device state of every slot and the graphs."""

    def __init__(
        self,
        model: PagedModel,
        limits: BatchLimits,
        *,
        row_of: RowOf,
        scratch: Any = None,
        use_graphs: bool = True,
    ) -> None:
        """`row_of` describes a sequence to the reference sampler, for steps the kernels cannot sample."""
        self._model = model
        self._limits = limits
        self._row_of = row_of
        self._device = model.device
        self._is_cuda = self._device.type == "cuda"
        self._has_kernels = self._is_cuda or model.uses_kernels
        rows = limits.max_num_seqs
        self._block_table_host = self._pinned(rows, limits.max_blocks_per_seq)
        self.slots = Slots(limits, self._block_table_host.numpy())
        self._planner = Planner(limits, self.slots, allow_cascade=not model.has_windows)
        self._block_table = self._block_table_host.to(self._device, copy=True)
        self._tally = TokenTally(rows, model.vocabulary, self._device)
        self._params = SlotParams(rows, self._device, self._tally if self._has_kernels else None)
        self._last_token = torch.zeros(rows, dtype=torch.int32, device=self._device)
        size = buffer_size(limits)
        self._packed = torch.zeros(size, dtype=torch.int32, device=self._device)
        host = [self._pinned(size) for _ in range(NUM_BUFFERS if self._is_cuda else 1)]
        self._host = deque((packed, views_of(packed.numpy(), limits)) for packed in host)
        self._results = deque(self._pinned(rows) for _ in range(NUM_BUFFERS))
        self._result = torch.zeros(rows, dtype=torch.int32, device=self._device)
        width = 1 + 2 * MAX_LOGPROBS
        self._logprobs = torch.zeros(rows, width, dtype=torch.int32, device=self._device)
        self._logprobs_host = deque(self._pinned(rows, width) for _ in range(NUM_BUFFERS))
        self._views: dict[str, Tensor] = views_of(self._packed, limits)
        self._batch = make_batch(self._views, self._block_table, scratch)
        self._hidden = torch.zeros(
            limits.max_num_tokens, model.hidden_size, dtype=model.dtype, device=self._device
        )
        self._graphs = GraphPool(is_on=self._is_cuda and use_graphs, has_collectives=self.has_peers)

    @property
    def has_peers(self) -> bool:
        """Whether other ranks run the same steps."""
        return self._model.ranks.size > 1

    @property
    def tally_bytes(self) -> int:
        """What rows with penalties take on the device once there are any."""
        return self._tally.num_bytes if self._has_kernels else 0

    def _pinned(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, pin_memory=self._is_cuda)

    @torch.inference_mode()
    def launch(self, step: Step) -> InFlight:
        """Start a step; on CUDA this returns before it has run, unless the host has to sample."""
        self._update_slots(step)
        packed, parts = self._host[0]
        self._host.rotate(-1)
        plan = self._planner.fill(step, parts)
        num_tokens, num_rows = plan.num_tokens, plan.num_samples
        if self._graphs.is_on:
            num_tokens = padded(num_tokens, self._limits.max_num_tokens)
            num_rows = padded(num_rows, self._limits.max_num_seqs)
        self._planner.pad(parts, plan, num_tokens, num_rows)
        self._packed.copy_(packed, non_blocking=True)
        self._run_body(plan, num_tokens)
        slots = parts["sample_slot"][: plan.num_samples].copy()
        if not len(slots):
            return InFlight(step, slots, None, None, Sampled([], []))
        if self._has_kernels and self._params.are_fast(slots):
            result, event, logprobs = self._sample_on_device(num_rows)
            return InFlight(step, slots, result, event, None, logprobs)
        return InFlight(step, slots, None, None, self._sample_on_host(step.sampled))

    def _update_slots(self, step: Step) -> None:
        for running in step.admitted:
            self.slots.start(running.slot, running.num_cached_tokens, running.num_sampled)
            self._params.write(running.slot, self._row_of(running))
        changed = self.slots.write_block_tables(step)
        if len(changed) * ROW_COPY_BYTES > self._block_table.nbytes:
            self._block_table.copy_(self._block_table_host, non_blocking=True)
            return
        for slot in changed:
            self._block_table[slot].copy_(self._block_table_host[slot], non_blocking=True)

    def _run_body(self, plan: Plan, num_tokens: int) -> None:
        batch = cut(self._batch, plan, num_tokens)

        def body() -> None:
            self._hidden[:num_tokens] = self._model.hidden(batch, self._last_token)

        self._graphs.run(_body_key(num_tokens, is_mixed=batch.is_mixed), body)

    def _logits(self, num_rows: int) -> Tensor:
        rows = self._views["sample_token"][:num_rows].long()
        return self._model.logits(self._hidden[rows])

    def _run_head(self, num_rows: int) -> None:
        from inference.kernels import device_sampler  # Triton exists where CUDA does

        params, needs = self._params, self._params.needs

        def head() -> None:
            device_sampler.sample(
                self._logits(num_rows),
                self._views["sample_slot"][:num_rows],
                self._views["sample_position"][:num_rows],
                self._views["counts"],
                params.on_device,
                self._last_token,
                self._result,
                has_draws=needs.draws,
                has_floors=needs.floors,
                has_bans=needs.bans,
                tally=self._tally.table if needs.penalties else None,
                logprobs=self._logprobs if needs.logprobs else None,
                vocabulary=self._model.vocabulary,
                ranks=self._model.ranks,
            )

        self._graphs.run(_head_key(num_rows, needs), head)

    def _sample_on_device(self, num_rows: int) -> tuple[Tensor, Any, Tensor | None]:
        self._run_head(num_rows)
        result = self._results[0]
        self._results.rotate(-1)
        result[:num_rows].copy_(self._result[:num_rows], non_blocking=True)
        logprobs = None
        if self._params.has_logprobs:
            logprobs = self._logprobs_host[0]
            self._logprobs_host.rotate(-1)
            logprobs[:num_rows].copy_(self._logprobs[:num_rows], non_blocking=True)
        if not self._is_cuda:
            return result, None, logprobs
        cuda: Any = torch.cuda
        event = cuda.Event()
        event.record()
        return result, event, logprobs

    def _sample_on_host(self, rows: Sequence[Running]) -> Sampled:
        """Sample with the reference; waits for the device. Earlier steps' tokens must have been taken."""
        sampled = sample(
            self._logits(len(rows)),
            [self._row_of(running) for running in rows],
            self._model.vocabulary,
        )
        tokens = torch.tensor([max(0, t) for t in sampled.token_ids], dtype=torch.int32)
        slots = np.array([running.slot for running in rows])
        self._last_token[torch.from_numpy(slots).to(self._device)] = tokens.to(self._device)
        is_tallied = self._params.tallied(slots)
        if is_tallied.any():
            self._tally.count(slots[is_tallied], np.array(sampled.token_ids)[is_tallied])
        return sampled

    @torch.inference_mode()
    def warm_up(
        self, sizes: Sequence[int], *, row_sizes: Sequence[int], needs: SamplingNeeds
    ) -> None:
        """Capture the graphs of these token and row counts, largest first, so that they share memory.

        Heads are those of `needs`; another kind is captured when a row first asks for it.
        """
        if not self._graphs.is_on:
            return
        if needs.penalties:
            self._tally.allocated()
        self.run_sizes(sizes, row_sizes=row_sizes, needs=needs)
        self._graphs.is_warm = True
        if self._is_cuda:
            torch.cuda.synchronize()

    @torch.inference_mode()
    def expect(self, needs: SamplingNeeds, *, num_rows: int, num_tokens: int) -> None:
        """Capture what is missing for sequences that an engine is about to begin with, while no other runs.

        Args:
            needs: of these sequences between them.
            num_rows: how many they are: heads are captured for as many rows, and fewer.
            num_tokens: of a full step: bodies are captured for the sizes next to it.
        """
        limits = self._limits
        needs = SamplingNeeds.of_all([self._params.needs, needs])
        most_rows = padded(min(num_rows, limits.max_num_seqs), limits.max_num_seqs)
        heads = [n for n in sizes(most_rows) if self._graphs.lacks(_head_key(n, needs))]
        both = {*around(min(num_tokens, limits.max_num_tokens), limits.max_num_tokens)}
        bodies = [n for n in both if self._graphs.lacks(_body_key(n, is_mixed=True))]
        if not heads and not bodies:
            return
        if needs.penalties:
            self._tally.allocated()
        self._packed.zero_()
        self._params.expect(needs)
        with self._graphs.expected():
            for num_tokens in sorted(bodies, reverse=True):
                self._run_body(Plan(num_tokens, 0, 0, 1), num_tokens)
            for num_rows in sorted(heads, reverse=True):
                self._run_head(num_rows)

    @torch.inference_mode()
    def run_sizes(
        self,
        sizes: Sequence[int],
        *,
        row_sizes: Sequence[int],
        needs: SamplingNeeds = GREEDY,
    ) -> None:
        """Run every kind of body, and heads of this kind, in these sizes, largest first.

        Other heads run once outside graphs, so that their kernels are compiled when a row comes that needs them.
        """
        self._packed.zero_()
        most_decoded = padded(self._limits.max_num_seqs, self._limits.max_num_tokens)
        for num_tokens in sorted(sizes, reverse=True):
            for num_tiles in (1, 0) if num_tokens <= most_decoded else (1,):
                self._run_body(Plan(num_tokens, 0, 0, num_tiles), num_tokens)
        self._params.expect(needs)
        for num_rows in sorted(row_sizes, reverse=True):
            self._run_head(num_rows)
        with self._graphs.off():
            for has_floors in (False, True):
                self._params.expect(SamplingNeeds(draws=True, floors=has_floors))
                self._run_head(min(row_sizes))
        self._params.expect(needs)

    @torch.inference_mode()
    def run_largest(self) -> None:
        """Run the largest body and head once, outside graphs: what they allocate is what any step needs.

        The heads do all they can, so that their kernels are compiled when a row comes that needs them; what the tally
        takes is `tally_bytes`. Collectives of every kind and size run too, whose buffers the library takes from the
        device when it first needs them.
        """
        self._packed.zero_()
        limits = self._limits
        with self._graphs.off():
            self._run_body(Plan(limits.max_num_tokens, 0, 0, 1), limits.max_num_tokens)
            if not self._has_kernels:
                return
            for has_floors in (False, True):
                self._params.expect(SamplingNeeds(True, has_floors, True, True, True))
                self._run_head(limits.max_num_seqs)
            self._params.expect(GREEDY)

    def needs_host(self, step: Step) -> bool:
        """Whether this step is sampled on the host, which must know all tokens before it."""
        if not self._has_kernels:
            return True
        params, row_of = self._params, self._row_of
        if not all(params.is_fast(running.slot, row_of(running)) for running in step.admitted):
            return True
        if not self._params.has_slow:
            return False
        return not self._params.are_fast([running.slot for running in step.sampled])


def _body_key(num_tokens: int, *, is_mixed: bool) -> tuple[str, int, bool]:
    return "body", num_tokens, is_mixed


def _head_key(num_rows: int, needs: SamplingNeeds) -> tuple[str, int, SamplingNeeds]:
    return "head", num_rows, needs
