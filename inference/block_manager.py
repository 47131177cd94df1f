"""BlockManager: who holds which KV block, and which full blocks of prompt can be used again. No torch here.

    free --allocate--> held --release (last holder)--> free      not registered
                        |                         `--> cached    registered; still allocatable, oldest first
      cached --share--> held

A registered block is known by the tokens in it and by the registered block before it, compared exactly
(never by a hash alone), so two sequences share a block only if all tokens up to its end are the same.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

TRASH_BLOCK = 0
"""Never handed out: where the padding tokens of a step are written."""

ROOT = 0
"""Prefix id before the first block."""


class BlockManager:
    """Hands out blocks, counts their holders and remembers registered prefixes."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        """`num_blocks` counts the trash block."""
        if num_blocks < 2:
            raise ValueError(f"a KV cache needs at least 2 blocks, got {num_blocks}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_holders = [0] * num_blocks
        self._prefix_id_of: dict[int, int] = {}  # registered block -> its prefix id
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._block_at: dict[tuple[int, tuple[int, ...]], int] = {}
        self._next_prefix_id = ROOT + 1

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that sequences may hold in all."""
        return self.num_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` can give out now, cached ones included."""
        return len(self._free) + len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def num_holders(self, block: int) -> int:
        """Sequences that hold the block now."""
        return self._num_holders[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one holder. The caller has checked `num_free_blocks`."""
        assert count <= self.num_free_blocks, f"{count} blocks asked, {self.num_free_blocks} free"
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_at[self._key_of.pop(block)]
            del self._prefix_id_of[block]
        self._num_holders[block] = 1
        return block

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """Return the registered blocks that hold the longest prefix of `token_ids`; none is taken yet.

        At least one token is left over, because a sequence needs a forward pass to go on.
        """
        blocks: list[int] = []
        prefix_id = ROOT
        size = self.block_size
        for start in range(0, len(token_ids) - size, size):
            block = self._block_at.get((prefix_id, tuple(token_ids[start : start + size])))
            if block is None:
                break
            blocks.append(block)
            prefix_id = self._prefix_id_of[block]
        return blocks

    def num_taken_by(self, blocks: Iterable[int]) -> int:
        """How many of these blocks `share` would take from the free ones."""
        return sum(self._num_holders[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Add one holder to each of these registered blocks."""
        for block in blocks:
            assert block in self._prefix_id_of, f"block {block} is not registered"
            if self._num_holders[block] == 0:
                del self._cached[block]
            self._num_holders[block] += 1

    def register(self, block: int, parent: int, token_ids: Sequence[int]) -> int:
        """Make a full block reusable after prefix `parent`; return the prefix id of what ends with it.

        If other tokens' twin is registered already, that one stays and its id is returned.
        """
        assert len(token_ids) == self.block_size, (len(token_ids), self.block_size)
        key = (parent, tuple(token_ids))
        known = self._block_at.get(key)
        if known is not None:
            return self._prefix_id_of[known]
        assert block not in self._prefix_id_of, f"block {block} is registered already"
        prefix_id = self._next_prefix_id
        self._next_prefix_id += 1
        self._block_at[key] = block
        self._key_of[block] = key
        self._prefix_id_of[block] = prefix_id
        return prefix_id

    def prefix_id(self, block: int) -> int:
        """Return the prefix id of a registered block."""
        return self._prefix_id_of[block]

    def release(self, block_table: Iterable[int]) -> None:
        """Drop one holder of each block, the last block first, so that prefixes outlive their ends."""
        for block in reversed(list(block_table)):
            self._num_holders[block] -= 1
            assert self._num_holders[block] >= 0, f"block {block} was released twice"
            if self._num_holders[block] == 0:
                if block in self._prefix_id_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def forget_prefixes(self) -> None:
        """Make cached blocks plain free ones; held ones stay reusable."""
        for block in self._cached:
            del self._block_at[self._key_of.pop(block)]
            del self._prefix_id_of[block]
            self._free.append(block)
        self._cached.clear()

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless every block is in exactly one state and has the holders it counts."""
        holders = [0] * self.num_blocks
        for table in block_tables:
            assert len(set(table)) == len(table), f"a block table names a block twice: {table}"
            for block in table:
                holders[block] += 1
        assert holders == self._num_holders, "holders counted and holders found differ"
        assert holders[TRASH_BLOCK] == 0, "the trash block was handed out"
        free, cached = list(self._free), list(self._cached)
        held = [block for block in range(1, self.num_blocks) if holders[block]]
        assert sorted(free + cached + held) == list(range(1, self.num_blocks)), "a block was lost"
        assert all(block in self._prefix_id_of for block in cached), "a cached block has no prefix"
        assert not any(block in self._prefix_id_of for block in free), "a free block has a prefix"
        assert self._block_at == {key: block for block, key in self._key_of.items()}
        assert self._key_of.keys() == self._prefix_id_of.keys()
