"""Paged decode attention: one query token a row, keys and values read in place from the cache's blocks.

The work of a step is a list of items, each a range of one row's tokens, longest first; a fixed number of
programs draws (item, KV head) pairs from it by an atomic counter, so one captured launch serves any batch and a
program that starts late, because another kernel holds its place, leaves its share to the others. All query heads of a KV head
share its keys (GQA-packed).

A row of several parts, its items and those of a shared prefix, which the tile kernel writes beside this one, leaves
them normalised; whoever leaves the last one merges them.

    N query heads   K KV heads   G = N / K   H head dim   S tokens in one block
"""

import triton
import triton.language as tl

from inference.kernels.attend import attend, merge_parts


@triton.jit
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    items_ptr,
    num_items_ptr,
    ticket_ptr,
    out_ptr,
    part_out_ptr,
    part_lse_ptr,
    arrivals_ptr,
    scale_log2,
    table_stride,
    K: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_PTX: tl.constexpr,
):
    """q [T,N,H]; k, v [blocks,K,S,H] (v also as `attend` has it); out [T,N,H]; part_out [P,N,H] fp32; part_lse [P,N] fp32, base 2.

    `ticket_ptr` points to a 0 and `arrivals_ptr` to zeros [T,K], and do so again when the launch is over.
    """
    offs_g = tl.arange(0, G_PAD)
    offs_h = tl.arange(0, H_PAD)
    is_head = (offs_g[:, None] < G) & (offs_h[None, :] < H)
    N: tl.constexpr = K * G
    num_pairs = tl.load(num_items_ptr) * K
    pair = tl.atomic_add(ticket_ptr, 1)
    while pair < num_pairs:
        item = items_ptr + (pair // K) * 8
        head = pair % K
        row = tl.load(item)
        slot = tl.load(item + 1)
        start = tl.load(item + 2)
        end = tl.load(item + 3)
        part = tl.load(item + 4)
        q_offs = (row * N + head * G + offs_g[:, None]) * H + offs_h[None, :]
        q = tl.load(q_ptr + q_offs, mask=is_head, other=0.0)
        own = tl.load(item + 5) - 1
        position = tl.zeros([G_PAD], tl.int32) + own
        row_table = table_ptr + slot.to(tl.int64) * table_stride
        result, lse = attend(
            q,
            k_ptr,
            v_ptr,
            row_table,
            head,
            start,
            end,
            own,
            position,
            scale_log2,
            G_PAD,
            K,
            H,
            H_PAD,
            S,
            TILE,
            WINDOW,
            STAGES,
            STAGES if WINDOW > 0 else 1,
            HAS_PTX,
        )
        if part < 0:
            tl.store(out_ptr + q_offs, result.to(out_ptr.dtype.element_ty), mask=is_head)
        else:
            heads = part * N + head * G + offs_g
            tl.store(part_out_ptr + heads[:, None] * H + offs_h[None, :], result, mask=is_head)
            tl.store(part_lse_ptr + heads, lse, mask=offs_g < G)
            arrivals = arrivals_ptr + row * K + head
            tl.debug_barrier()  # all of the part is written before it is counted
            if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == tl.load(item + 6) - 1:
                tl.store(arrivals, 0)
                merge_parts(
                    part_out_ptr,
                    part_lse_ptr,
                    out_ptr,
                    tl.load(item + 7),
                    tl.load(item + 6),
                    row,
                    head,
                    K,
                    G,
                    G_PAD,
                    H,
                    H_PAD,
                )
        pair = tl.atomic_add(ticket_ptr, 1)
    # Every program draws one ticket too many; whoever draws the last of all resets the counter.
    if pair == num_pairs + tl.num_programs(0) - 1:
        tl.store(ticket_ptr, 0)
