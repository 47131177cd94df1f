"""The planner's cut of attention work: every row meets every key it should, once."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from inference.batch import NUM_ITEMS, BatchLimits, buffer_size, views_of
from inference.block_budget import MIN_SHARING_ROWS
from inference.planner import Planner, Slots
from inference.sequence import Sequence
from inference.steps import Running, Step

BLOCK = 16
NUM_ROWS = 40
LIMITS = BatchLimits(
    max_num_tokens=64,
    max_num_seqs=NUM_ROWS,
    block_size=BLOCK,
    max_blocks_per_seq=64,
    tile_queries=4,
    num_programs=24,
    max_num_items=4 * NUM_ROWS,
)


def running_of(slot: int) -> Running:
    running = Running(Sequence(slot, [1]), [1], 1)
    running.slot = slot
    return running


@given(
    groups=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 40), st.integers(1, 300)), max_size=5
    ),
    seed=st.integers(0, 1000),
)
def test_every_row_meets_every_key_of_its_own_once(groups, seed):
    """`groups`: rows that share a prefix, its blocks, tokens that each has of its own."""
    rng = np.random.default_rng(seed)
    slots = Slots(LIMITS, np.zeros((NUM_ROWS, 64), np.int32))
    order = rng.permutation(NUM_ROWS)
    rows: list[int] = []
    lens: dict[int, int] = {}
    shares: dict[int, int] = {}
    for number, (size, num_blocks, own) in enumerate(groups):
        for row in (int(slot) for slot in order[len(rows) : len(rows) + size]):
            rows.append(row)
            lens[row] = num_blocks * BLOCK + int(rng.integers(1, own + 1))
            slots.context_len[row] = lens[row] - 1
            slots.shared_len[row] = num_blocks * BLOCK
            slots.shared_block[row] = 7 + number if num_blocks else 0
            shares[row] = num_blocks * BLOCK if size >= MIN_SHARING_ROWS else 0
    rng.shuffle(rows)
    parts = views_of(np.zeros(buffer_size(LIMITS), np.int32), LIMITS)
    decodes = [running_of(slot) for slot in rows]
    plan = Planner(LIMITS, slots).fill(Step(1, decodes, True, [], [], [], [], decodes), parts)

    met: Counter[tuple[int, int]] = Counter()
    left: Counter[int] = Counter()
    for slot, begin, end, first, count, position, nth in parts["tiles"][: plan.num_tiles].tolist():
        assert position == end, "rows of a group see the whole of a piece"
        assert slots.shared_block[slot] > 0
        for row in parts["cascade_rows"][first : first + count].tolist():
            assert slots.shared_block[rows[row]] == slots.shared_block[slot], "another's prefix"
            assert nth < parts["row_num_parts"][row]
            met.update((rows[row], key) for key in range(begin, end))
            left[row] += 1
    own = 0
    for item in parts["items"][: parts["counts"][NUM_ITEMS]].tolist():
        row, slot, begin, end, part, length, num_parts, _ = item
        assert (slot, length) == (rows[row], lens[rows[row]])
        met.update((slot, key) for key in range(begin, end))
        own += end - begin
        if part >= 0:
            left[row] += 1
            assert num_parts > 1
    assert met == Counter((row, key) for row in rows for key in range(lens[row]))
    assert plan.num_decode_keys == own == sum(lens[row] - shares[row] for row in rows)
    for row, num_left in left.items():
        assert parts["row_num_parts"][row] in (0, num_left), "a part that nobody waits for"
