"""The block manager loses no block, shares none wrongly and forgets prefixes only when it must."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.block_manager import ROOT, TRASH_BLOCK, BlockManager

SIZE = 4


def register_all(blocks: BlockManager, table: list[int], token_ids: list[int]) -> None:
    prefix_id = ROOT
    for index in range(len(token_ids) // SIZE):
        tokens = token_ids[index * SIZE : (index + 1) * SIZE]
        prefix_id = blocks.register(table[index], prefix_id, tokens)


def start(blocks: BlockManager, token_ids: list[int]) -> list[int] | None:
    """Give a prompt its blocks as the scheduler does; None if there is no room."""
    shared = blocks.match(token_ids)
    count = blocks.num_blocks_for(len(token_ids)) - len(shared)
    if count + blocks.num_taken_by(shared) > blocks.num_free_blocks:
        return None
    blocks.share(shared)
    table = [*shared, *blocks.allocate(count)]
    register_all(blocks, table, token_ids)
    return table


def test_a_manager_needs_a_block_besides_the_trash_block():
    with pytest.raises(ValueError, match="at least 2 blocks, got 1"):
        BlockManager(num_blocks=1, block_size=SIZE)


def test_the_trash_block_is_never_handed_out():
    blocks = BlockManager(num_blocks=6, block_size=SIZE)
    assert TRASH_BLOCK not in blocks.allocate(5)
    assert blocks.num_free_blocks == 0


def test_a_prefix_is_shared_by_whole_blocks_and_never_to_the_last_token():
    blocks = BlockManager(num_blocks=20, block_size=SIZE)
    table = start(blocks, list(range(8)))
    assert blocks.match(list(range(8))) == table[:1]
    assert blocks.match([*range(8), 99]) == table[:2]
    assert blocks.match([*range(7), 99, 99]) == table[:1]
    assert blocks.match([99, *range(1, 9)]) == []


def test_equal_blocks_after_different_prefixes_are_not_shared():
    blocks = BlockManager(num_blocks=20, block_size=SIZE)
    start(blocks, [1, 1, 1, 1, 5, 5, 5, 5])
    assert blocks.match([2, 2, 2, 2, 5, 5, 5, 5, 9]) == []


def test_a_released_prefix_is_reused_until_its_block_is_needed():
    blocks = BlockManager(num_blocks=5, block_size=SIZE)
    table = start(blocks, list(range(12)))
    blocks.release(table)
    assert blocks.num_free_blocks == 4
    assert blocks.match([*range(12), 99]) == table
    blocks.allocate(2)  # the free one, then the cached one that ends the prefix
    assert blocks.match([*range(12), 99]) == table[:2]


def test_a_child_is_not_found_after_its_parents_block_holds_other_tokens():
    blocks = BlockManager(num_blocks=4, block_size=SIZE)
    table = start(blocks, list(range(8)))
    blocks.share(table[1:])  # the end is held by another sequence, the beginning is not
    blocks.release(table)
    taken = blocks.allocate(2)
    assert table[0] in taken
    blocks.register(table[0], ROOT, [7, 7, 7, 7])
    assert blocks.match([7, 7, 7, 7, 4, 5, 6, 7, 9]) == [table[0]]


def test_forgetting_prefixes_keeps_blocks_in_use():
    blocks = BlockManager(num_blocks=9, block_size=SIZE)
    held, gone = start(blocks, [1] * 5), start(blocks, [2] * 5)
    blocks.release(gone)
    blocks.forget_prefixes()
    assert blocks.match([2] * 5) == []
    assert blocks.match([1] * 5) == held[:1]
    blocks.check_integrity([held])


def test_releasing_twice_is_noticed():
    blocks = BlockManager(num_blocks=4, block_size=SIZE)
    table = blocks.allocate(2)
    blocks.release(table)
    with pytest.raises(AssertionError, match="released twice"):
        blocks.release(table)


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=17)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), PROMPTS), max_size=40))
def test_any_order_of_starts_and_ends_keeps_integrity_and_contents(events):
    blocks = BlockManager(num_blocks=14, block_size=SIZE)
    contents: dict[int, tuple[int, ...]] = {}  # what was last written to each full block
    live: list[tuple[list[int], list[int]]] = []
    for is_start, which, prompt in events:
        if is_start:
            known = blocks.match(prompt)
            for index, block in enumerate(known):
                assert contents[block] == tuple(prompt[: (index + 1) * SIZE])
            table = start(blocks, prompt)
            if table is not None:
                for index in range(len(known), len(prompt) // SIZE):
                    contents[table[index]] = tuple(prompt[: (index + 1) * SIZE])
                live.append((table, prompt))
        elif live:
            table, _ = live.pop(which % len(live))
            blocks.release(table)
        blocks.check_integrity([table for table, _ in live])
    for table, _ in live:
        blocks.release(table)
    assert blocks.num_free_blocks == blocks.num_usable_blocks
