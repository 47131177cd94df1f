"""A mixture of experts in five launches: route, count, place, gate and up, down; then a sum over a token's experts.

Rows (a token with one of its experts) are put in order of their experts, each expert's padded to whole blocks of BM
rows, so that every program multiplies one expert's weights with one block. The grids are as large as any routing of
so many tokens needs, and programs past the last block end at once: one captured launch serves any routing.

    T tokens   E experts   TOP_K experts a token   S = T TOP_K rows   D hidden size   I width of an expert (WIDTH)
"""

import triton
import triton.language as tl

from inference.kernels.elementwise import gated


@triton.jit
def route_kernel(
    logits_ptr,
    expert_ptr,
    weight_ptr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    IS_NORMED: tl.constexpr,
):
    """logits [T,E] -> expert, weight [T,TOP_K]: the most likely experts; the lowest number wins a tie."""
    token = tl.program_id(0)
    offs = tl.arange(0, E_PAD)
    logits = tl.load(logits_ptr + token * E + offs, mask=offs < E, other=float("-inf"))
    logits = logits.to(tl.float32)
    share = tl.exp(logits - tl.max(logits, 0))
    share = tl.where(offs < E, share / tl.sum(share, 0), -1.0)
    places = tl.arange(0, K_PAD)
    experts = tl.zeros([K_PAD], tl.int32)
    weights = tl.zeros([K_PAD], tl.float32)
    for place in tl.static_range(TOP_K):
        top = tl.max(share, 0)
        at = tl.min(tl.where(share == top, offs, E_PAD), 0)
        at = tl.minimum(at, E - 1)  # no share equals a NaN
        experts = tl.where(places == place, at, experts)
        weights = tl.where(places == place, top, weights)
        share = tl.where(offs == at, -1.0, share)
    if IS_NORMED:
        weights = weights / tl.sum(weights, 0)
    out = token * TOP_K + places
    tl.store(expert_ptr + out, experts, mask=places < TOP_K)
    tl.store(weight_ptr + out, weights.to(weight_ptr.dtype.element_ty), mask=places < TOP_K)


@triton.jit
def count_kernel(expert_ptr, count_ptr, S, BLOCK: tl.constexpr):
    """expert [S] -> count [E]: rows of each expert, a program each."""
    expert = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, S, BLOCK):
        at = start + offs
        found += (tl.load(expert_ptr + at, mask=at < S, other=-1) == expert).to(tl.int32)
    tl.store(count_ptr + expert, tl.sum(found, 0))


@triton.jit
def place_kernel(
    expert_ptr,
    count_ptr,
    rows_ptr,
    block_expert_ptr,
    num_blocks_ptr,
    S,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each expert's rows, in order, from its first block on, padded with S; a program for each expert."""
    expert = tl.program_id(0)
    others = tl.arange(0, E_PAD)
    blocks = tl.load(count_ptr + others, mask=others < E, other=0)
    blocks = (blocks + BM - 1) // BM
    first = tl.sum(tl.where(others < expert, blocks, 0), 0)
    count = tl.load(count_ptr + expert)
    num_blocks = (count + BM - 1) // BM
    if expert == 0:
        tl.store(num_blocks_ptr, tl.sum(blocks, 0))
    for block in range(num_blocks):
        tl.store(block_expert_ptr + first + block, expert)
    rows = rows_ptr + first * BM
    padding = count + tl.arange(0, BM)
    tl.store(rows + padding, S, mask=padding < num_blocks * BM)
    offs = tl.arange(0, BLOCK)
    seen = 0
    for start in range(0, S, BLOCK):
        at = start + offs
        is_here = (tl.load(expert_ptr + at, mask=at < S, other=-1) == expert).to(tl.int32)
        tl.store(rows + seen + tl.cumsum(is_here, 0) - 1, at, mask=is_here > 0)
        seen += tl.sum(is_here, 0)


@triton.jit
def gate_up_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    rows_ptr,
    block_expert_ptr,
    num_blocks_ptr,
    out_ptr,
    S,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """x [T,D], weight [E,2I,D] -> out [blocks BM, I] = silu(x gate) * (x up), a row for each row of the blocks."""
    NUM_N: tl.constexpr = (WIDTH + BN - 1) // BN
    block = tl.program_id(0) // NUM_N
    if block >= tl.load(num_blocks_ptr):
        return
    expert = tl.load(block_expert_ptr + block).to(tl.int64)
    offs_m = tl.arange(0, BM)
    offs_n = (tl.program_id(0) % NUM_N) * BN + tl.arange(0, BN)
    offs_k = tl.arange(0, BK)
    row = tl.load(rows_ptr + block * BM + offs_m)
    is_row = row < S
    is_n = offs_n < WIDTH
    token = (row // TOP_K).to(tl.int64)
    x_place = x_ptr + token[:, None] * D + offs_k[None, :]
    gate_place = weight_ptr + expert * (2 * WIDTH * D) + offs_n[None, :] * D + offs_k[:, None]
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, D, BK, num_stages=STAGES):
        if D % BK == 0:
            x = tl.load(x_place + k, mask=is_row[:, None], other=0.0)
        else:
            x = tl.load(x_place + k, mask=is_row[:, None] & (offs_k[None, :] < D - k), other=0.0)
        if D % BK == 0 and WIDTH % BN == 0:
            gate_weight = tl.load(gate_place + k)
            up_weight = tl.load(gate_place + WIDTH * D + k)
        else:
            mask = is_n[None, :] & (offs_k[:, None] < D - k)
            gate_weight = tl.load(gate_place + k, mask=mask, other=0.0)
            up_weight = tl.load(gate_place + WIDTH * D + k, mask=mask, other=0.0)
        gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
        up = tl.dot(x, up_weight, up, input_precision="ieee")
    if IS_FP8:
        x_scale = tl.load(x_scale_ptr + token, mask=is_row, other=0.0)[:, None]
        scale_place = scale_ptr + expert * (2 * WIDTH) + offs_n
        gate *= x_scale * tl.load(scale_place, mask=is_n, other=0.0)[None, :]
        up *= x_scale * tl.load(scale_place + WIDTH, mask=is_n, other=0.0)[None, :]
    gate = gate.to(out_ptr.dtype.element_ty).to(tl.float32)
    up = up.to(out_ptr.dtype.element_ty).to(tl.float32)
    value = gated(gate, up, out_ptr.dtype.element_ty)
    out_place = (block * BM + offs_m).to(tl.int64)[:, None] * WIDTH + offs_n[None, :]
    mask = is_row[:, None] & is_n[None, :]
    tl.store(out_ptr + out_place, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def down_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    rows_ptr,
    block_expert_ptr,
    num_blocks_ptr,
    share_ptr,
    out_ptr,
    S,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """x [blocks BM, I], weight [E,D,I], share [S] -> out [S,D] = share (x weight), back in the order of tokens."""
    NUM_N: tl.constexpr = (D + BN - 1) // BN
    block = tl.program_id(0) // NUM_N
    if block >= tl.load(num_blocks_ptr):
        return
    expert = tl.load(block_expert_ptr + block).to(tl.int64)
    offs_m = tl.arange(0, BM)
    offs_n = (tl.program_id(0) % NUM_N) * BN + tl.arange(0, BN)
    offs_k = tl.arange(0, BK)
    row = tl.load(rows_ptr + block * BM + offs_m)
    is_row = row < S
    is_n = offs_n < D
    place = (block * BM + offs_m).to(tl.int64)
    x_place = x_ptr + place[:, None] * WIDTH + offs_k[None, :]
    weight_place = weight_ptr + expert * (D * WIDTH) + offs_n[None, :] * WIDTH + offs_k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, WIDTH, BK, num_stages=STAGES):
        if WIDTH % BK == 0:
            x = tl.load(x_place + k, mask=is_row[:, None], other=0.0)
        else:
            x = tl.load(
                x_place + k, mask=is_row[:, None] & (offs_k[None, :] < WIDTH - k), other=0.0
            )
        if WIDTH % BK == 0 and D % BN == 0:
            weight = tl.load(weight_place + k)
        else:
            mask = is_n[None, :] & (offs_k[:, None] < WIDTH - k)
            weight = tl.load(weight_place + k, mask=mask, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    if IS_FP8:
        acc *= tl.load(x_scale_ptr + place, mask=is_row, other=0.0)[:, None]
        acc *= tl.load(scale_ptr + expert * D + offs_n, mask=is_n, other=0.0)[None, :]
    share = tl.load(share_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    value = acc.to(out_ptr.dtype.element_ty).to(tl.float32) * share[:, None]
    out_place = row.to(tl.int64)[:, None] * D + offs_n[None, :]
    mask = is_row[:, None] & is_n[None, :]
    tl.store(out_ptr + out_place, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(x_ptr, out_ptr, D: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """x [T,TOP_K,D] -> out [T,D]."""
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < D
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(TOP_K):
        x = tl.load(x_ptr + (token * TOP_K + place) * D + offs, mask=mask, other=0.0)
        total += x.to(tl.float32)
    tl.store(out_ptr + token * D + offs, total.to(out_ptr.dtype.element_ty), mask=mask)
