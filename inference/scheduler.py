"""Scheduler: which tokens the next step computes. Pure policy, without torch.

Every step decodes all running sequences and spends the rest of its token target on prefill. The target is
the work that is left over the steps the longest completion still needs: a decode step of few rows costs
almost as much as one of a few hundred, so an even load is cheaper than a crowd and then a tail.

    waiting --admit--> prefilling --last chunk--> decoding --last token--> finished
       ^                                            |
       +------------------ preempt -----------------+     last resort; its tokens are computed again

What happens when is kept in calendars by step number, so a step costs its events and not its rows.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable

from inference.block_budget import MIN_SHARING_ROWS, BlockBudget
from inference.block_manager import ROOT, BlockManager
from inference.even_load import EvenLoad, Waiting
from inference.expectations import LengthEstimate, PlannedPrefixes
from inference.sequence import Sequence
from inference.steps import Chunk, Running, Step

HOLD_BACK_STEPS = 16
"""Steps without admissions after a preemption, so that what was taken is not asked for again at once."""


class Scheduler:
    """Admits, chunks, grows, preempts; knows nothing of devices."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        min_step_tokens: int | None = None,
        completion_of: Callable[[Running], list[int]] = lambda running: [],
        sizes_around: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        """`min_step_tokens` is the least target of a step; None: every step is as full as it can be.

        `sizes_around` gives the sizes next to a number of tokens that steps are computed at, which prefill fills
        up; None: every size. `completion_of` gives the tokens sampled since `running.token_ids` was set; asked on
        preemption.
        """
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self._completion_of = completion_of
        self._load = EvenLoad(min_step_tokens or max_num_batched_tokens, sizes_around)
        self.lengths = LengthEstimate()
        self._budget = BlockBudget(blocks, self.lengths)
        self._waiting = Waiting(blocks.block_size)
        self._planned = PlannedPrefixes(blocks.block_size)
        self._prefilling: deque[Running] = deque()
        self._decoding: list[Running] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._finish_at: dict[int, list[Running]] = defaultdict(list)
        self._grow_at: dict[int, list[Running]] = defaultdict(list)
        self._step = 0
        self._has_new_rows = False
        self._hold_back_until = 0
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with blocks: prefilling or decoding."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_free_slots(self) -> int:
        """Slots that waiting sequences may be given."""
        return len(self._free_slots)

    @property
    def running(self) -> list[Running]:
        """Sequences that hold blocks."""
        return [*self._prefilling, *self._decoding]

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences. The caller has checked that each fits the cache alone."""
        for sequence in sequences:
            prompt = list(sequence.prompt_token_ids)
            max_tokens = min(sequence.sampling.max_tokens, self.max_model_len - len(prompt))
            running = Running(sequence, prompt, max_tokens)
            running.num_expected_tokens = min(max_tokens, self.lengths.of(sequence))
            running.num_planned_cached = self._planned.add(prompt)
            self._waiting.add(running)
            self._load.num_work_tokens += len(prompt) - running.num_planned_cached
            self._load.num_work_tokens += running.num_expected_tokens

    def foreseen_step_tokens(self) -> int:
        """Return how many tokens a step will be of, by what waits while nothing runs."""
        share = self._load.share(self._step + 1, 0, self._waiting, 0)
        return min(share, self._waiting.num_prefill_tokens, self.max_num_batched_tokens)

    def is_short_of_blocks(self) -> bool:
        """Whether the next `schedule` would have to preempt; results in flight may still free blocks."""
        growing, num_free = self._grow_at.get(self._step + 1, ()), self.blocks.num_free_blocks
        if len(growing) <= num_free:
            return False
        return sum(self._has_outgrown(running, self._step + 1) for running in growing) > num_free

    def schedule(self) -> Step | None:
        """Return the next step, or None when nothing can be computed before a slot is given back."""
        if not self._prefilling and not self._decoding and not (self._waiting and self._free_slots):
            return None
        self._step += 1
        grown = self._grow()
        decodes = list(self._decoding)
        has_new_rows, self._has_new_rows = self._has_new_rows, False
        budget = self._token_target(len(decodes)) - len(decodes)
        chunks, admitted = self._prefill(budget)
        assert decodes or chunks, "a step without tokens: a waiting sequence does not fit the cache"
        self._load.num_work_tokens -= len(decodes) + sum(chunk.num_tokens for chunk in chunks)
        finishing = [r for r in self._finish_at.pop(self._step, ()) if not r.is_finished]
        for running in finishing:
            self._leave(running)
        sampled = decodes + [chunk.running for chunk in chunks if chunk.is_last]
        return Step(self._step, decodes, has_new_rows, chunks, admitted, grown, finishing, sampled)

    def finish(self, running: Running, num_completion_tokens: int) -> None:
        """Take out a sequence that ended before its last allowed token. Safe if it has left already."""
        self._load.num_work_tokens -= max(0, running.num_expected_tokens - num_completion_tokens)
        if not running.is_finished:
            if running.row >= 0:
                self._finish_at[running.last_step].remove(running)
            self._leave(running)

    def restart(
        self, step: Step, has_ended: Callable[[Running], bool] = lambda running: False
    ) -> None:
        """Take back a step that could not be run: everything running waits again, to be recomputed.

        `has_ended` says of the sequences that were to end with it which are known to have ended before.
        """
        for running in step.finishing:
            if not has_ended(running):
                running.is_finished = False
                self._requeue(running)
        for running in self.running:
            self._preempt(running)
        self.blocks.forget_prefixes()  # among them blocks that the step was to fill

    def shrink(self) -> bool:
        """After a restart, with every slot free: make steps smaller; False if they cannot be.

        First of half as many tokens; where they would not do for one of every sequence, of half as many sequences.
        """
        num_seqs, limit = len(self._free_slots), self.max_num_batched_tokens
        if limit <= num_seqs:
            num_seqs //= 2
        if not num_seqs:
            return False
        self._free_slots = self._free_slots[-num_seqs:]
        self.max_num_batched_tokens = max(num_seqs, limit // 2)
        return True

    def forget_prefixes(self) -> None:
        """Forget what has run: later sequences prefill their whole prompts (benchmarks)."""
        self.blocks.forget_prefixes()
        self._planned = PlannedPrefixes(self.blocks.block_size)

    def release_slot(self, running: Running) -> None:
        """Give the slot of a finished sequence back, once nothing of its last step is needed any more."""
        self._free_slots.append(running.slot)

    def _token_target(self, num_decodes: int) -> int:
        begun = sum(len(r.token_ids) - r.num_computed_tokens for r in self._prefilling)
        target = self._load.target(self._step, num_decodes, self._waiting, begun)
        return min(target, self.max_num_batched_tokens)

    # ---- prefill

    def _prefill(self, budget: int) -> tuple[list[Chunk], list[Running]]:
        chunks: list[Chunk] = []
        admitted: list[Running] = []
        while budget > 0:
            if not self._prefilling and not self._admit(admitted):
                break
            running = self._prefilling[0]
            start = running.num_computed_tokens
            num_tokens = min(budget, len(running.token_ids) - start)
            is_last = start + num_tokens == len(running.token_ids)
            running.num_computed_tokens += num_tokens
            budget -= num_tokens
            self._register(running)
            chunks.append(Chunk(running, start, num_tokens, is_last))
            if is_last:
                self._prefilling.popleft()
                self._join(running)
        return chunks, admitted

    def _admit(self, admitted: list[Running]) -> bool:
        """Give the next waiting sequence a slot and blocks; False if there is none or no room."""
        if not self._waiting or not self._free_slots or self._is_holding_back():
            return False
        running = self._waiting.next()
        shared = self.blocks.match(running.token_ids)
        running.num_expected_tokens = max(running.num_expected_tokens, running.num_sampled + 1)
        if not self._budget.admits(self._step, running, shared, lambda: self.running):
            return False
        self._waiting.pop()
        self._budget.begin(running, shared)
        running.slot = self._free_slots.pop()
        num_cached = len(shared) * self.blocks.block_size
        running.num_computed_tokens = num_cached
        running.num_registered_blocks = len(shared)
        running.prefix_id = self.blocks.prefix_id(shared[-1]) if shared else ROOT
        if running.num_sampled == 0:
            running.num_cached_tokens = num_cached
        self._load.num_work_tokens -= num_cached - running.num_planned_cached
        running.num_planned_cached = 0
        self._prefilling.append(running)
        admitted.append(running)
        return True

    def _register(self, running: Running) -> None:
        """Make the prompt's full blocks reusable at once: a step stores all keys before it reads any."""
        size = self.blocks.block_size
        for index in range(running.num_registered_blocks, running.num_computed_tokens // size):
            tokens = running.token_ids[index * size : (index + 1) * size]
            block = running.block_table[index]
            running.prefix_id = self.blocks.register(block, running.prefix_id, tokens)
            running.num_registered_blocks = index + 1

    # ---- decode

    def _join(self, running: Running) -> None:
        """The step that is being made samples its next token; from the one after on it decodes."""
        running.last_step = self._step + running.num_tokens_left - 1
        self._finish_at[running.last_step].append(running)
        if running.num_tokens_left == 1:
            return  # its blocks are in use until this step's end
        running.joined_at = self._step + 1
        running.num_shared_blocks = self._num_shared_blocks(running)
        running.row = len(self._decoding)
        self._decoding.append(running)
        self._has_new_rows = True
        expected = self._step + running.num_expected_tokens - running.num_sampled
        self._load.last_finish = max(self._load.last_finish, min(running.last_step, expected))
        self._plan_growth(running)

    def _num_shared_blocks(self, running: Running) -> int:
        count = 0
        limit = (len(running.token_ids) - 1) // self.blocks.block_size
        for block in running.block_table[:limit]:
            if self.blocks.num_holders(block) < MIN_SHARING_ROWS:
                break
            count += 1
        return count

    def _plan_growth(self, running: Running) -> None:
        """Note the step at which the sequence would write past its blocks, if it lives that long."""
        room = len(running.block_table) * self.blocks.block_size - len(running.token_ids)
        if room < running.num_tokens_left - 1:
            self._grow_at[running.joined_at + room].append(running)

    def _has_outgrown(self, running: Running, step: int) -> bool:
        """Whether it has no block for what the step stores; what was noted before a preemption may not hold."""
        room = len(running.block_table) * self.blocks.block_size
        return running.row >= 0 and running.num_stored(step) >= room

    def _grow(self) -> list[Running]:
        """Extend the sequences that outgrow their blocks in this step, preempting others if need be."""
        grown = []
        for running in self._grow_at.pop(self._step, ()):
            while self._has_outgrown(running, self._step) and not self.blocks.num_free_blocks:
                self._preempt(max(self.running, key=lambda r: (r.row < 0, r.joined_at)))
            if self._has_outgrown(running, self._step):
                self._budget.grow(running)
                self._plan_growth(running)
                grown.append(running)
        return [running for running in grown if running.row >= 0]

    def _is_holding_back(self) -> bool:
        """After a preemption nobody is admitted for a while, unless nothing else can go on."""
        return self._step < self._hold_back_until and self.num_running > 0

    def _preempt(self, running: Running) -> None:
        """Send the latest comer back to waiting, with the tokens it has sampled added to its prompt."""
        self.num_preemptions += 1
        self._hold_back_until = self._step + HOLD_BACK_STEPS
        if running.row >= 0:
            self._drop_row(running)
            self._finish_at[running.last_step].remove(running)
        else:
            self._prefilling.remove(running)
        self._budget.release(running)
        running.block_table = []
        self._requeue(running)

    def _requeue(self, running: Running) -> None:
        tokens = self._completion_of(running)
        self._load.num_work_tokens += running.num_computed_tokens + len(tokens)
        running.token_ids = running.token_ids + tokens
        running.num_sampled += len(tokens)
        self._free_slots.append(running.slot)
        running.slot, running.num_computed_tokens = -1, 0
        self._waiting.push(running)

    def _leave(self, running: Running) -> None:
        running.is_finished = True
        if running.row >= 0:
            self._drop_row(running)
        elif running in self._prefilling:
            self._prefilling.remove(running)
        # The table itself stays: the step being made may still have to write it to the device.
        self._budget.release(running)

    def _drop_row(self, running: Running) -> None:
        last = self._decoding.pop()
        if last is not running:
            last.row = running.row
            self._decoding[last.row] = last
        running.row = -1
        self._has_new_rows = True
