"""Planner: a scheduler's step as a packed batch. Runs on the host, in numpy, while the device computes.

Attention work is cut here: decoding rows into items of about one size, chunks and shared prefixes into tiles.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inference.batch import (
    NOT_CASCADE,
    NUM_ITEMS,
    NUM_SAMPLES,
    NUM_TILES,
    TILE_QUARTERS,
    BatchLimits,
    Plan,
)
from inference.block_budget import MIN_SHARING_ROWS
from inference.block_manager import TRASH_BLOCK
from inference.steps import Chunk, Running, Step

IntArray = np.ndarray[Any, np.dtype[np.int32]]

ITEMS_PER_PROGRAM = 3
"""Attention work is cut so that each program gets about this many items, or more when rows are short."""

MIN_ITEM_TOKENS = 256


@dataclass(slots=True)
class Slots:
    """The host's state of every slot, updated by events and read by the planner."""

    limits: BatchLimits
    block_table: IntArray
    """[slots, blocks of a sequence], zeros: the host copy of the device's."""

    context_len: IntArray = field(init=False)
    num_sampled: IntArray = field(init=False)
    shared_len: IntArray = field(init=False)
    shared_block: IntArray = field(init=False)

    def __post_init__(self) -> None:
        rows = self.limits.max_num_seqs
        self.context_len = np.zeros(rows, np.int32)
        self.num_sampled = np.zeros(rows, np.int32)
        self.shared_len = np.zeros(rows, np.int32)
        self.shared_block = np.zeros(rows, np.int32)

    def write_block_tables(self, step: Step) -> list[int]:
        """Take over what a step changes of the block tables; return the slots it concerns.

        What is past the end of a table is trash.
        """
        table = self.block_table
        for running in step.admitted:
            table[running.slot, : len(running.block_table)] = running.block_table
            table[running.slot, len(running.block_table) :] = TRASH_BLOCK
        for running in step.grown:
            end = len(running.block_table)
            begin = end - running.num_grown_blocks
            table[running.slot, begin:end] = running.block_table[begin:]
        return [running.slot for running in (*step.admitted, *step.grown)]

    def start(self, slot: int, num_computed: int, num_sampled: int) -> None:
        """Begin a sequence in a slot, with this much of it in the cache."""
        self.context_len[slot] = num_computed
        self.num_sampled[slot] = num_sampled
        self.shared_len[slot] = 0

    def slot_of_tokens(self, slot: Any, positions: Any) -> Any:
        """Return the cache slots of tokens, given their sequences' slots and their positions."""
        size = self.limits.block_size
        return self.block_table[slot, positions // size] * size + positions % size


class Planner:
    """Turns a scheduler's step into a packed batch."""

    def __init__(self, limits: BatchLimits, slots: Slots, *, allow_cascade: bool = True) -> None:
        self._limits = limits
        self._allow_cascade = allow_cascade
        self._slots = slots
        self._row_slot: IntArray = np.zeros(0, np.int32)

    def fill(self, step: Step, parts: dict[str, Any]) -> Plan:
        """Write `step` into the packed buffer's parts and move the slots on by what it computes."""
        if step.has_new_rows or len(self._row_slot) != len(step.decodes):
            self._row_slot = np.array([running.slot for running in step.decodes], np.int32)
        num_rows = len(self._row_slot)
        plan = Plan(num_rows, num_rows, num_rows, 0)
        self._fill_decodes(parts, self._row_slot, plan)
        for chunk in step.chunks:
            self._fill_chunk(parts, chunk, plan)
        parts["counts"][NUM_TILES] = plan.num_tiles
        parts["counts"][TILE_QUARTERS] = _tile_quarters(parts["tiles"], plan)
        parts["counts"][NUM_SAMPLES] = plan.num_samples
        return plan

    def _fill_decodes(self, parts: dict[str, Any], rows: IntArray, plan: Plan) -> None:
        """Write the decoding rows, whose slots are given, and the tiles of prefixes they share."""
        slots, num_rows = self._slots, len(rows)
        positions = slots.context_len[rows]
        parts["token_source"][:num_rows] = -rows - 1
        parts["positions"][:num_rows] = positions
        parts["slot_mapping"][:num_rows] = slots.slot_of_tokens(rows, positions)
        parts["row_slot"][:num_rows] = rows
        parts["row_len"][:num_rows] = positions + 1
        parts["sample_token"][:num_rows] = np.arange(num_rows)
        parts["sample_slot"][:num_rows] = rows
        parts["sample_position"][:num_rows] = slots.num_sampled[rows]
        self._fill_items(parts, rows, positions + 1, plan)
        slots.context_len[rows] += 1
        slots.num_sampled[rows] += 1

    def _fill_chunk(self, parts: dict[str, Any], chunk: Chunk, plan: Plan) -> None:
        """Write one prefill chunk behind what the plan has so far."""
        slots, running, slot = self._slots, chunk.running, chunk.running.slot
        begin, end = plan.num_tokens, plan.num_tokens + chunk.num_tokens
        at = np.arange(chunk.start, chunk.start + chunk.num_tokens, dtype=np.int32)
        tokens = running.token_ids[chunk.start : chunk.start + chunk.num_tokens]
        parts["token_source"][begin:end] = tokens
        parts["positions"][begin:end] = at
        parts["slot_mapping"][begin:end] = slots.slot_of_tokens(slot, at)
        plan.num_tiles = self._fill_tiles(
            parts["tiles"], plan.num_tiles, slot, begin, chunk.start, chunk.num_tokens
        )
        slots.context_len[slot] = chunk.start + chunk.num_tokens
        plan.num_tokens = end
        if chunk.is_last:
            parts["sample_token"][plan.num_samples] = end - 1
            parts["sample_slot"][plan.num_samples] = slot
            parts["sample_position"][plan.num_samples] = slots.num_sampled[slot]
            plan.num_samples += 1
            slots.num_sampled[slot] += 1
            self._join(running, slot)

    def pad(self, parts: dict[str, Any], plan: Plan, num_tokens: int, num_samples: int) -> None:
        """Fill up to the sizes a captured graph has; padding reads token 0 and writes to the trash block."""
        parts["token_source"][plan.num_tokens : num_tokens] = 0
        parts["positions"][plan.num_tokens : num_tokens] = 0
        parts["slot_mapping"][plan.num_tokens : num_tokens] = TRASH_BLOCK
        parts["sample_token"][plan.num_samples : num_samples] = 0
        parts["sample_slot"][plan.num_samples : num_samples] = 0
        parts["sample_position"][plan.num_samples : num_samples] = 0

    def _join(self, running: Running, slot: int) -> None:
        shared = running.num_shared_blocks if self._allow_cascade else 0
        self._slots.shared_len[slot] = shared * self._limits.block_size
        self._slots.shared_block[slot] = running.block_table[shared - 1] if shared else 0

    def _fill_tiles(
        self, tiles: IntArray, at: int, slot: int, first: int, start: int, count: int
    ) -> int:
        """Append the tiles of one chunk whose `count` tokens begin at `first` in the batch."""
        size = self._limits.tile_queries
        begins = np.arange(0, count, size, dtype=np.int32)[::-1]  # the longest first
        ends = np.minimum(begins + size, count)
        part = tiles[at : at + len(begins)]
        part[:, 0] = slot
        part[:, 1] = 0
        part[:, 2] = start + ends
        part[:, 3] = first + begins
        part[:, 4] = ends - begins
        part[:, 5] = start + begins
        part[:, 6] = NOT_CASCADE
        return at + len(begins)

    def _fill_items(
        self, parts: dict[str, Any], rows: IntArray, lens: IntArray, plan: Plan
    ) -> None:
        """Cut the rows' own keys into items of about one size."""
        limits, num_rows = self._limits, len(rows)
        prefix, plan.num_tiles, num_prefix_parts = self._fill_cascade(parts, rows)
        own = lens - prefix
        plan.num_decode_keys = int(own.sum())
        block = limits.block_size
        target = max(
            plan.num_decode_keys // (ITEMS_PER_PROGRAM * limits.num_programs),
            MIN_ITEM_TOKENS,
            plan.num_decode_keys // max(1, limits.max_num_items - num_rows) + block,
        )
        count = -(-own // (-(-target // block) * block))
        if num_rows and count.max() == 1:
            self._fill_whole_items(parts, rows, lens, prefix, num_prefix_parts)
            return
        size = -(-own // (count * block)) * block
        count = -(-own // size)
        num_parts = count + num_prefix_parts
        is_cut = num_parts > 1
        held = np.where(is_cut, num_parts, 0)
        first_part = np.cumsum(held) - held
        row_of = np.repeat(np.arange(num_rows), count)
        nth = _nth(count)
        begin = prefix[row_of] + nth * size[row_of]
        end = np.minimum(begin + size[row_of], lens[row_of])
        order = np.argsort(begin - end, kind="stable")
        items = parts["items"][: len(row_of)]
        items[:, 0] = row_of[order]
        items[:, 1] = rows[row_of[order]]
        items[:, 2] = begin[order]
        items[:, 3] = end[order]
        part = np.where(is_cut[row_of], first_part[row_of] + num_prefix_parts[row_of] + nth, -1)
        items[:, 4] = part[order]
        items[:, 5] = lens[row_of[order]]
        items[:, 6] = num_parts[row_of[order]]
        items[:, 7] = first_part[row_of[order]]
        parts["counts"][NUM_ITEMS] = len(row_of)
        parts["row_part"][:num_rows] = first_part
        parts["row_num_parts"][:num_rows] = np.where(num_prefix_parts > 0, num_parts, 0)
        parts["row_num_parts"][num_rows:] = 0

    def _fill_whole_items(
        self,
        parts: dict[str, Any],
        rows: IntArray,
        lens: IntArray,
        prefix: IntArray,
        num_prefix_parts: IntArray,
    ) -> None:
        """Make each row's own keys one item, the longest first: none is long enough to be cut."""
        num_rows = len(rows)
        has_prefix = num_prefix_parts > 0
        num_parts = np.where(has_prefix, num_prefix_parts + 1, 0)
        first_part = np.cumsum(num_parts) - num_parts
        order = np.argsort(prefix - lens)
        items = parts["items"][:num_rows]
        items[:, 0] = order
        items[:, 1] = rows[order]
        items[:, 2] = prefix[order]
        items[:, 3] = items[:, 5] = lens[order]
        items[:, 4] = np.where(has_prefix, first_part + num_prefix_parts, -1)[order]
        items[:, 6] = num_parts[order]
        items[:, 7] = first_part[order]
        parts["counts"][NUM_ITEMS] = num_rows
        parts["row_part"][:num_rows] = first_part
        parts["row_num_parts"][:num_rows] = num_parts
        parts["row_num_parts"][num_rows:] = 0

    def _fill_cascade(
        self, parts: dict[str, Any], rows: IntArray
    ) -> tuple[IntArray, int, IntArray]:
        """Group the rows by shared prefix; return each row's prefix length, the tiles, each row's parts."""
        limits, slots = self._limits, self._slots
        prefix = slots.shared_len[rows]
        none = np.zeros(len(rows), np.int32)
        if not prefix.any():
            return none, 0, none
        keys = np.where(prefix > 0, slots.shared_block[rows], 0)
        order = np.argsort(keys, kind="stable").astype(np.int32)
        sorted_keys = keys[order]
        bounds = np.concatenate(([0], np.flatnonzero(np.diff(sorted_keys)) + 1, [len(rows)]))
        is_group = (np.diff(bounds) >= MIN_SHARING_ROWS) & (sorted_keys[bounds[:-1]] > 0)
        start, size = bounds[:-1][is_group], np.diff(bounds)[is_group]
        parts["cascade_rows"][: len(rows)] = order
        length = prefix[order[start]]
        num_tiles = -(-size // limits.tile_queries)
        num_pieces = _num_pieces(length, int(num_tiles.sum()), limits)
        piece = -(-length // (num_pieces * limits.block_size)) * limits.block_size
        num_pieces = -(-length // piece)
        shared, num_parts = none.copy(), none.copy()
        members = order[np.repeat(start, size) + _nth(size)]
        shared[members], num_parts[members] = np.repeat(length, size), np.repeat(num_pieces, size)
        # Each group's tiles of queries, and of each tile the pieces of the prefix.
        count = num_tiles * num_pieces
        group = np.repeat(np.arange(len(start)), count)
        nth_tile, nth_piece = np.divmod(_nth(count), num_pieces[group])
        first = start[group] + nth_tile * limits.tile_queries
        begin = nth_piece * piece[group]
        tiles = parts["tiles"][: len(group)]
        tiles[:, 0] = rows[order[start]][group]
        tiles[:, 1] = begin
        tiles[:, 2] = tiles[:, 5] = np.minimum(begin + piece[group], length[group])
        tiles[:, 3] = first
        tiles[:, 4] = np.minimum(limits.tile_queries, (start + size)[group] - first)
        tiles[:, 6] = nth_piece
        return shared, len(group), num_parts


def _nth(count: Any) -> Any:
    """Return 0, 1, ... for each of several counts, one after the other."""
    return np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)


def _num_pieces(length: Any, num_tiles: int, limits: BatchLimits) -> Any:
    """Cut long prefixes so that all tiles keep the programs busy, in pieces of at least 256 tokens."""
    return np.clip(length // 256, 1, max(1, limits.num_programs // max(1, num_tiles)))


def _tile_quarters(tiles: IntArray, plan: Plan) -> int:
    """Return how many fourths of the tile programs are to work beside the decode programs.

    Both kinds compete for a multiprocessor's registers, so too many of the one starve the other. By measurement on
    an H100: half where the decoding rows' keys outnumber the tiles', all where there are hardly any.
    """
    begin, end = tiles[: plan.num_tiles, 1], tiles[: plan.num_tiles, 2]
    num_tile_keys = int(end.sum()) - int(begin.sum())
    if plan.num_decode_keys > num_tile_keys:
        return 2
    return 3 if 8 * plan.num_decode_keys > num_tile_keys else 4
