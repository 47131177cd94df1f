"""Attention of many query tokens over paged keys: prefill chunks, and prefixes shared by decoding rows.

A tile is up to M / G query tokens of one block table, all G query heads of a KV head packed into its M rows.

    prefill   consecutive tokens of one chunk, causal, keys from the cache (the chunk's own are already there)
    cascade   decoding rows that share a prefix: its keys are read once for all of them; leaves parts, and merges those
              of a row whose last one it leaves (see `decode_attention`)

One launch does both kinds, so that it gets its place before the decode kernel that runs beside it.

    N query heads   K KV heads   G = N / K   H head dim   S tokens in one block
"""

import triton
import triton.language as tl

from inference.kernels.attend import attend, merge_parts


@triton.jit
def tile_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    tiles_ptr,
    num_tiles_ptr,
    quarters_ptr,
    ticket_ptr,
    rows_ptr,
    row_part_ptr,
    row_num_parts_ptr,
    out_ptr,
    part_out_ptr,
    part_lse_ptr,
    arrivals_ptr,
    scale_log2,
    table_stride,
    K: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_PTX: tl.constexpr,
):
    """q [T,N,H]; k, v [blocks,K,S,H]; out [T,N,H] (prefill); part_out [P,N,H], part_lse [P,N] (cascade).

    Of the programs, `quarters_ptr` fourths do the work. `ticket_ptr` points to a 0, and does so again when the
    launch is over; for `arrivals_ptr` see `decode_kernel`.
    """
    num_working = tl.num_programs(0) * tl.load(quarters_ptr) // 4
    if tl.program_id(0) >= num_working:
        return
    offs_m = tl.arange(0, M)
    offs_h = tl.arange(0, H_PAD)
    N: tl.constexpr = K * G
    num_pairs = tl.load(num_tiles_ptr) * K
    pair = tl.atomic_add(ticket_ptr, 1)
    while pair < num_pairs:
        tile = tiles_ptr + (pair // K) * 7
        head = pair % K
        slot = tl.load(tile)
        start = tl.load(tile + 1)
        end = tl.load(tile + 2)
        query = tl.load(tile + 3) + offs_m // G
        is_query = offs_m // G < tl.load(tile + 4)
        first_position = tl.load(tile + 5)
        part_offset = tl.load(tile + 6)
        is_cascade = part_offset >= 0
        token = tl.load(rows_ptr + query, mask=is_query & is_cascade, other=0)
        token = tl.where(is_cascade, token, query)
        heads = head * G + offs_m % G
        mask = is_query[:, None] & (offs_h[None, :] < H)
        q_offs = (token * N + heads)[:, None] * H + offs_h[None, :]
        q = tl.load(q_ptr + q_offs, mask=mask, other=0.0)
        position = first_position + offs_m // G
        row_table = table_ptr + slot.to(tl.int64) * table_stride
        result, lse = attend(
            q,
            k_ptr,
            v_ptr,
            row_table,
            head,
            start,
            end,
            first_position,
            position,
            scale_log2,
            M,
            K,
            H,
            H_PAD,
            S,
            TILE,
            WINDOW,
            STAGES,
            STAGES,
            HAS_PTX,
        )
        if is_cascade:
            part = tl.load(row_part_ptr + token, mask=is_query, other=0) + part_offset
            place = part * N + heads
            tl.store(part_out_ptr + place[:, None] * H + offs_h[None, :], result, mask=mask)
            tl.store(part_lse_ptr + place, lse, mask=is_query)
            arrivals = arrivals_ptr + token * K + head
            num_parts = tl.load(row_num_parts_ptr + token, mask=is_query, other=0)
            is_row = is_query & (offs_m % G == 0)
            tl.debug_barrier()  # all parts are written before they are counted
            seen = tl.atomic_add(arrivals, 1, mask=is_row, sem="acq_rel", scope="gpu")
            is_last = is_row & (seen == num_parts - 1)
            if tl.max(is_last.to(tl.int32), 0) > 0:
                for nth in range(M // G):
                    is_it = is_last & (offs_m == nth * G)
                    if tl.max(is_it.to(tl.int32), 0) > 0:
                        row = tl.sum(tl.where(is_it, token, 0), 0)
                        tl.store(arrivals_ptr + row * K + head, 0)
                        merge_parts(
                            part_out_ptr,
                            part_lse_ptr,
                            out_ptr,
                            tl.load(row_part_ptr + row),
                            tl.load(row_num_parts_ptr + row),
                            row,
                            head,
                            K,
                            G,
                            G_PAD,
                            H,
                            H_PAD,
                        )
        else:
            tl.store(out_ptr + q_offs, result.to(out_ptr.dtype.element_ty), mask=mask)
        pair = tl.atomic_add(ticket_ptr, 1)
    if pair == num_pairs + num_working - 1:
        tl.store(ticket_ptr, 0)
