"""What the attention kernels share: one pass of M query rows over the paged keys of a KV head, and merging parts.

Softmax as FlashAttention has it: running maximum and sum, in base 2. Where keys and values are e4m3, products are
in fp16, into which a pair of them goes in one instruction. A product needs its second operand transposed, which shared
memory does for 16 bits but not for 8; so values may be given as int16, pairs of neighbours along the head, and even and
odd dims have a product each.

    M query rows   K KV heads   G query heads of each   H head dim   S tokens in one block
"""

import triton
import triton.language as tl


@triton.jit
def _pass(
    q,
    top,
    total,
    acc,
    acc_odd,
    k_ptr,
    v_ptr,
    row_table,
    head,
    begin,
    end,
    position,
    scale_log2,
    K: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_MASKED: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_PTX: tl.constexpr,
):
    """Attend to the tokens from `begin` to `end`; without a mask, all of them count for all queries."""
    IS_PAIRED: tl.constexpr = v_ptr.dtype.element_ty == tl.int16
    WIDTH: tl.constexpr = H // 2 if IS_PAIRED else H
    ZERO: tl.constexpr = 0 if IS_PAIRED else 0.0
    offs_h = tl.arange(0, H_PAD)
    offs_v = tl.arange(0, H_PAD // 2 if IS_PAIRED else H_PAD)
    offs_s = tl.arange(0, TILE)
    for at in tl.range(begin, end, TILE, num_stages=STAGES):
        block = tl.load(row_table + at // S).to(tl.int64)
        token = (block * K + head) * S + at % S
        k_place = k_ptr + token * H + offs_s[None, :] * H + offs_h[:, None]
        v_place = v_ptr + token * WIDTH + offs_s[:, None] * WIDTH + offs_v[None, :]
        offs = at + offs_s
        if IS_MASKED or H != H_PAD:
            in_range = offs < end
            k = tl.load(k_place, mask=in_range[None, :] & (offs_h[:, None] < H), other=0.0)
            v = tl.load(v_place, mask=in_range[:, None] & (offs_v[None, :] < WIDTH), other=ZERO)
        else:
            k = tl.load(k_place)
            v = tl.load(v_place)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale_log2
        if IS_MASKED:
            allowed = (offs[None, :] <= position[:, None]) & (offs < end)[None, :]
            if WINDOW > 0:
                allowed = allowed & (offs[None, :] > position[:, None] - WINDOW)
            scores = tl.where(allowed, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(q.dtype)
        acc = acc * shrink[:, None]
        if IS_PAIRED:
            even, odd = _parted(v, HAS_PTX)
            acc = tl.dot(weights, even, acc)
            acc_odd = tl.dot(weights, odd, acc_odd * shrink[:, None])
        else:
            acc = tl.dot(weights, v.to(q.dtype), acc, input_precision="ieee")
        top = new_top
    return top, total, acc, acc_odd


@triton.jit
def _parted(pairs, HAS_PTX: tl.constexpr):
    """Return the even and the odd ones of int16 pairs of e4m3, in fp16."""
    if HAS_PTX:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 both;
            .reg .b16 evens, odds;
            prmt.b32 both, $2, 0, 0x3120;
            mov.b32 {evens, odds}, both;
            cvt.rn.f16x2.e4m3x2 $0, evens;
            cvt.rn.f16x2.e4m3x2 $1, odds;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        even = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        odd = ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return even, odd


@triton.jit
def attend(
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
    M: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
    HAS_PTX: tl.constexpr,
):
    """Attend queries at `position` [M], the least of them first_position, to the tokens from `start` to `end`.

    k [blocks,K,S,H]; v the same, or [blocks,K,S,H/2] int16, pairs of e4m3. Returns the attention [M,H] and its
    log-sum-exp [M] in base 2; 0 and -inf where no token counted.
    """
    IS_PAIRED: tl.constexpr = v_ptr.dtype.element_ty == tl.int16
    if k_ptr.dtype.element_ty == tl.float8e4nv:
        q = q.to(tl.float16)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if IS_PAIRED:
        acc = tl.zeros([M, H_PAD // 2], tl.float32)
        acc_odd = tl.zeros([M, H_PAD // 2], tl.float32)
    else:
        acc = tl.zeros([M, H_PAD], tl.float32)
        acc_odd = total  # not used
    if WINDOW > 0:
        first = tl.maximum(first_position - WINDOW + 1, 0)
        middle = tl.maximum(start, (first // TILE) * TILE)
    else:
        # What every query sees needs no mask.
        whole = tl.minimum(end, first_position + 1)
        middle = start + tl.maximum(whole - start, 0) // TILE * TILE
        top, total, acc, acc_odd = _pass(
            q,
            top,
            total,
            acc,
            acc_odd,
            k_ptr,
            v_ptr,
            row_table,
            head,
            start,
            middle,
            position,
            scale_log2,
            K,
            H,
            H_PAD,
            S,
            TILE,
            0,
            False,
            STAGES,
            HAS_PTX,
        )
    top, total, acc, acc_odd = _pass(
        q,
        top,
        total,
        acc,
        acc_odd,
        k_ptr,
        v_ptr,
        row_table,
        head,
        middle,
        end,
        position,
        scale_log2,
        K,
        H,
        H_PAD,
        S,
        TILE,
        WINDOW,
        True,
        MASKED_STAGES,
        HAS_PTX,
    )
    if IS_PAIRED:
        acc = tl.reshape(tl.join(acc, acc_odd), [M, H_PAD])
    is_empty = total == 0.0
    safe_total = tl.where(is_empty, 1.0, total)
    return acc / safe_total[:, None], tl.where(is_empty, float("-inf"), top + tl.log2(safe_total))


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
