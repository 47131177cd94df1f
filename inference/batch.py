"""Batch: everything one forward pass needs to know, in one packed buffer of int32.

The host (`inference.planner`) fills a pinned copy and sends it in one transfer; kernels read their parts of the
device buffer, whose addresses never change, so captured graphs find them.

    T tokens: the decoding rows first, then the prefill chunks, then padding
    R rows that sample: the decoding rows first, then the chunks that are last, then padding
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

ITEM_FIELDS = 8
"""row, slot, kv_start (a block's first token), kv_end, part (-1: the only one), context length, and of the row: the
parts to merge once all are there, its first part."""

TILE_FIELDS = 7
"""slot, kv_start, kv_end, first query, number of queries, position of the first, part offset or NOT_CASCADE."""

NOT_CASCADE = -1
NUM_ITEMS, NUM_TILES, NUM_SAMPLES, TILE_QUARTERS = range(4)
"""Places in `counts`; the last: of the programs for tiles, how many fourths work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How large a batch can get, and how its attention work is cut."""

    max_num_tokens: int
    max_num_seqs: int
    block_size: int
    max_blocks_per_seq: int
    tile_queries: int
    """Query tokens in one prefill or cascade tile."""

    num_programs: int
    """Attention programs that run at once, over the KV heads: the work is cut to keep them all busy."""

    max_num_items: int = 8_192

    @property
    def max_num_tiles(self) -> int:
        """Tiles a step can need: full ones, and a last one for every chunk or piece of a prefix group."""
        return self.max_num_tokens // self.tile_queries + 2 * self.max_num_seqs + self.num_programs

    @property
    def sections(self) -> dict[str, tuple[int, ...]]:
        """Shape of each part of the packed buffer, in order."""
        tokens, rows = self.max_num_tokens, self.max_num_seqs
        return {
            "counts": (8,),
            "token_source": (tokens,),
            "positions": (tokens,),
            "slot_mapping": (tokens,),
            "row_slot": (rows,),
            "row_len": (rows,),
            "row_part": (rows,),
            "row_num_parts": (rows,),
            "sample_token": (rows,),
            "sample_slot": (rows,),
            "sample_position": (rows,),
            "cascade_rows": (rows,),
            "tiles": (self.max_num_tiles, TILE_FIELDS),
            "items": (self.max_num_items, ITEM_FIELDS),
        }


def views_of(buffer: Any, limits: BatchLimits) -> dict[str, Any]:
    """Return the named parts of a packed buffer, torch or numpy."""
    parts: dict[str, Any] = {}
    start = 0
    for name, shape in limits.sections.items():
        size = int(np.prod(shape))
        parts[name] = buffer[start : start + size].reshape(shape)
        start += size
    return parts


def buffer_size(limits: BatchLimits) -> int:
    """Return the packed buffer's length in int32."""
    return sum(int(np.prod(shape)) for shape in limits.sections.values())


@dataclass(slots=True, kw_only=True)
class Batch:
    """One forward pass as the model sees it: device views, cut to the padded sizes."""

    num_tokens: int
    """Padded."""

    num_decodes: int
    is_mixed: bool
    """Whether the step has prefill chunks or a shared prefix, and not only rows on their own."""

    counts: Tensor
    token_source: Tensor
    positions: Tensor
    slot_mapping: Tensor
    row_slot: Tensor
    row_len: Tensor
    row_part: Tensor
    row_num_parts: Tensor
    tiles: Tensor
    cascade_rows: Tensor
    items: Tensor
    block_table: Tensor
    """[slots, blocks of a sequence]"""

    scratch: Any = None
    """What the attention kernels keep between launches."""

    num_tiles: int = 0

    spans: Any = None
    """What `kernels.plain_attention` works out in a step's first layer."""

    def chunks(self) -> Iterator[list[int]]:
        """Yield the prefill tiles of this batch as lists, for `kernels.plain`."""
        for tile in self.tiles[: self.num_tiles].tolist():
            if tile[6] == NOT_CASCADE:
                yield tile


@dataclass(slots=True)
class Plan:
    """What the host knows of a packed batch."""

    num_tokens: int
    num_decodes: int
    num_samples: int
    num_tiles: int
    num_decode_keys: int = 0
    """Keys that the decoding rows read each for itself."""

    @property
    def is_mixed(self) -> bool:
        """Whether tiles are needed besides the decode items."""
        return self.num_tiles > 0


def make_batch(views: dict[str, Tensor], block_table: Tensor, scratch: Any = None) -> Batch:
    """Return a batch over the whole of a device buffer's parts; `cut` it to a step's sizes."""
    parts: dict[str, Any] = {
        name: view for name, view in views.items() if not name.startswith("sample_")
    }
    return Batch(
        num_tokens=views["token_source"].shape[0],
        num_decodes=0,
        is_mixed=False,
        block_table=block_table,
        scratch=scratch,
        **parts,
    )


def cut(whole: Batch, plan: Plan, num_tokens: int) -> Batch:
    """Return the batch of one step, padded to `num_tokens`."""
    return replace(
        whole,
        num_tokens=num_tokens,
        num_decodes=plan.num_decodes,
        is_mixed=plan.is_mixed,
        token_source=whole.token_source[:num_tokens],
        positions=whole.positions[:num_tokens],
        slot_mapping=whole.slot_mapping[:num_tokens],
        num_tiles=plan.num_tiles,
    )
