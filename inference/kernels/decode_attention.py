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


@triton.jit
def merge_parts(
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    first_part,
    num_parts,
    row,
    head,
    K: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
):
    """Write a row's attention in the G query heads of one KV head to out [T,N,H], from all its parts."""
    offs_g = tl.arange(0, G_PAD)
    offs_h = tl.arange(0, H_PAD)
    mask = (offs_g[:, None] < G) & (offs_h[None, :] < H)
    offs_n = head * G + offs_g
    N: tl.constexpr = K * G
    top = tl.full([G_PAD], float("-inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, H_PAD], tl.float32)
    for part in range(first_part, first_part + num_parts):
        heads = part * N + offs_n
        lse = tl.load(
            part_lse_ptr + heads, mask=offs_g < G, other=float("-inf"), cache_modifier=".cg"
        )
        place = part_out_ptr + heads[:, None] * H + offs_h[None, :]
        value = tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, lse)
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - safe_top)
        weight = tl.exp2(lse - safe_top)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + value * weight[:, None]
        top = new_top
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = out_ptr + (row * N + offs_n[:, None]) * H + offs_h[None, :]
    tl.store(place, result.to(out_ptr.dtype.element_ty), mask=mask)


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
):
    """q [T,N,H]; k, v [blocks,K,S,H]; out [T,N,H]; part_out [P,N,H] fp32; part_lse [P,N] fp32, base 2.

    `ticket_ptr` points to a 0 and `arrivals_ptr` to zeros [T,K], and do so again when the launch is over.
    """
    offs_g = tl.arange(0, G_PAD)
    offs_h = tl.arange(0, H_PAD)
    offs_s = tl.arange(0, TILE)
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
        if WINDOW > 0:
            first = tl.maximum(tl.load(item + 5) - WINDOW, 0)
            start = tl.maximum(start, (first // TILE) * TILE)
        q_offs = (row * N + head * G + offs_g[:, None]) * H + offs_h[None, :]
        q = tl.load(q_ptr + q_offs, mask=is_head, other=0.0)
        if k_ptr.dtype.element_ty == tl.float8e4nv:
            q = q.to(tl.float16)  # e4m3 becomes fp16 in one instruction, bf16 in several
        top = tl.full([G_PAD], float("-inf"), tl.float32)
        total = tl.zeros([G_PAD], tl.float32)
        acc = tl.zeros([G_PAD, H_PAD], tl.float32)
        row_table = table_ptr + slot.to(tl.int64) * table_stride
        for at in tl.range(start, end, TILE, num_stages=STAGES):
            block = tl.load(row_table + at // S).to(tl.int64)
            base = (block * K + head) * (S * H) + (at % S) * H
            in_range = at + offs_s < end
            if WINDOW > 0:
                in_range = in_range & (at + offs_s >= first)
            if H == H_PAD:
                k_mask = in_range[None, :]
                v_mask = in_range[:, None]
            else:
                k_mask = in_range[None, :] & (offs_h[:, None] < H)
                v_mask = in_range[:, None] & (offs_h[None, :] < H)
            k = tl.load(
                k_ptr + base + offs_s[None, :] * H + offs_h[:, None], mask=k_mask, other=0.0
            )
            v = tl.load(
                v_ptr + base + offs_s[:, None] * H + offs_h[None, :], mask=v_mask, other=0.0
            )
            scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale_log2
            scores = tl.where(in_range[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - safe_top[:, None])
            shrink = tl.exp2(top - safe_top)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
            top = new_top
        is_empty = total == 0.0
        result = acc / tl.where(is_empty, 1.0, total)[:, None]
        if part < 0:
            tl.store(out_ptr + q_offs, result.to(out_ptr.dtype.element_ty), mask=is_head)
        else:
            heads = part * N + head * G + offs_g
            tl.store(part_out_ptr + heads[:, None] * H + offs_h[None, :], result, mask=is_head)
            lse = tl.where(is_empty, float("-inf"), top + tl.log2(tl.where(is_empty, 1.0, total)))
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
