"""BlockBudget: gives sequences their KV blocks, few at a time, and says who may begin. No torch here.

admits --begin--> blocks of the prompt --grow--> more, as tokens come --release--> none
"""

from collections.abc import Callable

from inference.block_forecast import BlockForecast
from inference.block_manager import BlockManager
from inference.expectations import LengthEstimate
from inference.steps import Running

MIN_SHARING_ROWS = 4
"""A prefix is attended to once for all rows when at least this many rows hold it."""

MAX_SPARE_BLOCKS = 4
"""That a sequence gets before it needs them."""


class BlockBudget:
    """Blocks that running sequences hold, and those that they will still get."""

    def __init__(self, blocks: BlockManager, lengths: LengthEstimate) -> None:
        self._blocks = blocks
        self._forecast = BlockForecast(blocks.num_usable_blocks, blocks.block_size, lengths)
        self._num_running = 0
        self._num_missing = 0  # that all that run will get, if each comes to its longest

    def admits(
        self,
        step: int,
        running: Running,
        shared: list[int],
        everyone: Callable[[], list[Running]],
    ) -> bool:
        """Whether blocks suffice to the end with one more, which would share some; `everyone` gives all that run."""
        blocks = self._blocks
        num_begun = blocks.num_blocks_for(len(running.token_ids))
        num_needed = num_begun - len(shared) + blocks.num_taken_by(shared)
        if num_needed > blocks.num_free_blocks:
            return False
        running.num_missing_blocks = blocks.num_blocks_for(running.num_most_tokens) - num_begun
        num_missing = self._num_missing + running.num_missing_blocks
        if num_needed + num_missing <= blocks.num_free_blocks:  # with everyone at its longest
            return True
        is_alone = not self._num_running
        if is_alone or self._forecast.is_due(step):
            num_held = blocks.num_usable_blocks - blocks.num_free_blocks
            self._forecast.renew(step, everyone(), num_held, running)
        # What few hold may soon be its own.
        num_shared = sum(blocks.num_holders(block) >= MIN_SHARING_ROWS for block in shared)
        return self._forecast.admits(step, running, num_shared, is_alone=is_alone)

    def begin(self, running: Running, shared: list[int]) -> None:
        """Give one that was just admitted the blocks of what it prefills, the shared ones first."""
        num_begun = self._blocks.num_blocks_for(len(running.token_ids))
        self._blocks.share(shared)
        running.block_table = [*shared, *self._blocks.allocate(num_begun - len(shared))]
        self._num_running += 1
        self._num_missing += running.num_missing_blocks
        self._extend(running, self._spare_for(running))

    def grow(self, running: Running) -> None:
        """Give one its next block, and some to spare; one must be free."""
        running.num_grown_blocks = max(1, self._spare_for(running))
        self._extend(running, running.num_grown_blocks)

    def release(self, running: Running) -> None:
        """Take all blocks back; the table stays as it is."""
        self._blocks.release(running.block_table)
        self._num_running -= 1
        self._num_missing -= running.num_missing_blocks

    def _spare_for(self, running: Running) -> int:
        """Blocks it may have before it needs them, which is less work: where all could come to their longest."""
        if self._num_missing > self._blocks.num_free_blocks:
            return 0
        self._forecast.expire()  # it knows nothing of them, nor of who was admitted because of so much room
        return min(MAX_SPARE_BLOCKS, running.num_missing_blocks)

    def _extend(self, running: Running, num_blocks: int) -> None:
        running.block_table += self._blocks.allocate(num_blocks)
        running.num_missing_blocks -= num_blocks
        self._num_missing -= num_blocks
