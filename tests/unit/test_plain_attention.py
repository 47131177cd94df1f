"""Paged attention in torch, against softmax over each row's own keys in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.batch import NOT_CASCADE, TILE_FIELDS, Batch
from inference.kernels.plain_attention import attention

BLOCK = 4
HEAD_DIM = 8
EMPTY = torch.zeros(0, dtype=torch.int32)


class Rows:
    """Decoding rows and prefill chunks over a cache whose blocks are shuffled, poisoned past each row's end."""

    def __init__(
        self, lens: list[int], chunks: list[tuple[int, int]], heads: tuple[int, int]
    ) -> None:
        """`lens` of decoding rows; `chunks` of (tokens before, tokens)."""
        generator = torch.Generator().manual_seed(len(lens) + 7 * len(chunks))
        self.num_heads, num_kv_heads = heads
        self.totals = lens + [before + count for before, count in chunks]
        self.queries = [1] * len(lens) + [count for _, count in chunks]
        width = max(-(-total // BLOCK) for total in self.totals)
        num_blocks = width * len(self.totals) + 1
        order = torch.randperm(num_blocks - 1, generator=generator) + 1
        self.table = order.view(len(self.totals), width).int()
        shape = (num_blocks, num_kv_heads, BLOCK, HEAD_DIM)
        nan = torch.full(shape, float("nan"), dtype=torch.float64)
        self.k_cache, self.v_cache = nan.clone(), nan.clone()
        self.keys, self.values = [], []
        for slot, total in enumerate(self.totals):
            kv = torch.randn(2, total, num_kv_heads, HEAD_DIM, generator=generator).double()
            self.keys.append(kv[0]), self.values.append(kv[1])
            for position in range(total):
                block = int(self.table[slot, position // BLOCK])
                self.k_cache[block, :, position % BLOCK] = kv[0, position]
                self.v_cache[block, :, position % BLOCK] = kv[1, position]
        num_tokens = sum(self.queries)
        self.q = torch.randn(num_tokens, self.num_heads, HEAD_DIM, generator=generator).double()
        self.batch = self._batch(lens, chunks, num_tokens)

    def _batch(self, lens: list[int], chunks: list[tuple[int, int]], num_tokens: int) -> Batch:
        tiles = torch.zeros(len(chunks), TILE_FIELDS, dtype=torch.int32)
        first = len(lens)
        for i, (before, count) in enumerate(chunks):
            tiles[i, :5] = torch.tensor([len(lens) + i, 0, before + count, first, count])
            tiles[i, 6] = NOT_CASCADE
            first += count
        return Batch(
            num_tokens=num_tokens,
            num_decodes=len(lens),
            is_mixed=bool(chunks),
            counts=EMPTY,
            token_source=EMPTY,
            positions=EMPTY,
            slot_mapping=EMPTY,
            row_slot=torch.arange(len(lens), dtype=torch.int32),
            row_len=torch.tensor(lens, dtype=torch.int32),
            row_part=EMPTY,
            row_num_parts=EMPTY,
            tiles=tiles,
            cascade_rows=EMPTY,
            items=EMPTY,
            block_table=self.table,
            num_tiles=len(chunks),
        )

    def attend(self, window: int = 0) -> torch.Tensor:
        return attention(self.q, self.k_cache, self.v_cache, self.batch, scale=0.3, window=window)

    def expected(self, window: int = 0) -> torch.Tensor:
        out, first = torch.zeros_like(self.q), 0
        for keys, values, total, count in zip(
            self.keys, self.values, self.totals, self.queries, strict=True
        ):
            group = self.num_heads // keys.shape[1]
            for query in range(count):
                last = total - count + query
                begin = max(0, last - window + 1) if window else 0
                for head in range(self.num_heads):
                    k, v = (x[begin : last + 1, head // group] for x in (keys, values))
                    weights = torch.softmax(0.3 * k @ self.q[first + query, head], dim=0)
                    out[first + query, head] = weights @ v
            first += count
        return out


@settings(max_examples=40, deadline=None)
@given(
    lens=st.lists(st.integers(1, 60), max_size=6),
    chunks=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=3),
    heads=st.sampled_from([(2, 2), (4, 2), (6, 1)]),
    window=st.sampled_from([0, 1, 7]),
)
def test_every_row_attends_to_its_own_tokens_whatever_else_is_in_the_step(
    lens, chunks, heads, window
):
    if not lens and not chunks:
        return
    rows = Rows(lens, chunks, heads)
    torch.testing.assert_close(rows.attend(window), rows.expected(window), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        rows.attend(), rows.expected(), rtol=1e-9, atol=1e-9
    )  # a layer later


@pytest.mark.parametrize("num_short", [3, 40])
def test_a_long_row_does_not_make_short_ones_read_as_much(num_short):
    rows = Rows([9] * num_short + [400], [], (2, 1))
    rows.attend()
    read = sum(room.numel() for span in rows.batch.spans for room in span._room)
    assert read <= 2 * HEAD_DIM * (12 * num_short + 400)
