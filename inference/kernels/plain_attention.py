"""Paged attention in torch: the CPU's, and what the Triton kernel is tested against.

Keys and values are copied out of their blocks, side by side for each head, and attended by torch's own kernel. Rows of
about one length go together; what a step needs for that is worked out in its first layer and kept for the others.

T tokens   N query heads   K KV heads   G query heads of one KV head   H head dim   S tokens in one block
B rows that go together   Q tokens of each   L tokens of the longest, rounded up to whole blocks
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.batch import Batch

_LONGER = 1.25
"""Rows go together up to so many times the blocks of the shortest: padding costs, and so does every call."""


class Span:
    """Rows whose last Q tokens attend to all up to themselves, with room for their keys and values."""

    def __init__(self, tokens: Tensor, table: Tensor, lens: Tensor, k_cache: Tensor) -> None:
        """`tokens` are the rows' places among the step's tokens, [B,Q]; `table` is [B,blocks], `lens` [B]."""
        device = tokens.device
        _, num_kv_heads, block_size, head_dim = k_cache.shape
        num_rows, num_blocks = table.shape
        self.tokens = tokens
        self._shape = (num_rows, num_kv_heads, num_blocks * block_size, head_dim)
        heads = torch.arange(num_kv_heads, device=device)
        self._blocks = (table.long()[:, None] * num_kv_heads + heads[:, None]).flatten()
        self._at_L = torch.arange(self._shape[2], device=device)
        self._last_BQ = (
            lens[:, None] - tokens.shape[1] + torch.arange(tokens.shape[1], device=device)
        )
        is_past_BL = self._at_L >= lens[:, None]
        # What is past a row's end may be anything, NaN included, and 0 * NaN is NaN.
        self._past = is_past_BL[:, None].expand(self._shape[:3]).flatten().nonzero()[:, 0]
        size = (len(self._blocks), block_size * head_dim)
        self._room = [torch.empty(size, dtype=k_cache.dtype, device=device) for _ in range(2)]

    def attend(
        self, q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, window: int
    ) -> Tensor:
        """Return what the rows' tokens make of their keys and values, [B,Q,N,H]."""
        num_rows, num_kv_heads, _, head_dim = self._shape
        k_BKLH, v_BKLH = (
            self._gathered(cache, room).to(q_TNH.dtype)
            for cache, room in zip((k_cache, v_cache), self._room, strict=True)
        )
        mask_BQL = self._at_L <= self._last_BQ[..., None]
        if window:
            mask_BQL &= self._at_L > self._last_BQ[..., None] - window
        num_queries = self.tokens.shape[1]
        q = q_TNH[self.tokens].view(num_rows, num_queries, num_kv_heads, -1, head_dim)
        num_groups = q.shape[3]
        # The query heads of one KV head are so many more queries of it.
        q = q.permute(0, 2, 3, 1, 4).reshape(num_rows, num_kv_heads, -1, head_dim)
        mask = mask_BQL.repeat(1, num_groups, 1)[:, None]
        found: Tensor = F.scaled_dot_product_attention(
            q, k_BKLH, v_BKLH, attn_mask=mask, scale=scale
        )
        found = found.view(num_rows, num_kv_heads, num_groups, num_queries, head_dim)
        return found.permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _gathered(self, cache: Tensor, room: Tensor) -> Tensor:
        """[blocks,K,S,H] -> [B,K,L,H]"""
        torch.index_select(cache.flatten(0, 1).flatten(1), 0, self._blocks, out=room)
        room.view(-1, cache.shape[3])[self._past] = 0.0
        return room.view(self._shape)


def attention(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    *,
    scale: float,
    window: int = 0,
) -> Tensor:
    """Attend each token to its own sequence's tokens up to itself, the last `window` only; return [T,N,H]."""
    if batch.spans is None:
        batch.spans = list(_spans(batch, k_cache))
    out = torch.zeros_like(q_TNH)
    for span in batch.spans:
        out[span.tokens] = span.attend(q_TNH, k_cache, v_cache, scale, window)
    return out


def _spans(batch: Batch, k_cache: Tensor) -> Iterator[Span]:
    block_size, device = k_cache.shape[2], k_cache.device
    slots = batch.row_slot[: batch.num_decodes].long()
    lens, order = batch.row_len[: batch.num_decodes].long().sort()
    num_blocks = (-(-lens // block_size)).tolist()
    begins = [0] if num_blocks else []
    for row, count in enumerate(num_blocks):
        if count > _LONGER * num_blocks[begins[-1]] + 1:
            begins.append(row)
    for begin, end in pairwise([*begins, len(num_blocks)]):
        table = batch.block_table[slots[order[begin:end]], : num_blocks[end - 1]]
        yield Span(order[begin:end, None], table, lens[begin:end], k_cache)
    for slot, _, end, first, count, *_ in batch.chunks():
        table = batch.block_table[slot : slot + 1, : -(-end // block_size)]
        tokens = torch.arange(first, first + count, device=device)[None]
        yield Span(tokens, table, torch.tensor([end], device=device), k_cache)
