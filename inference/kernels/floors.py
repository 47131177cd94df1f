"""Floors: the least logit that top-k, top-p and min-p keep, found by bisection over its bits. No sort.

Where logits are bf16, only the 16 bits they have are searched; a row with penalties has scores with more bits, which
are searched too if more than one score lies where the floor was found.

R rows that sample   V vocabulary   C parts of it   P fields of a slot (`inference.slot_params`)
"""

import triton
import triton.language as tl

from inference.kernels.penalties import past_of, scores_at


@triton.jit
def row_max(value_ptr, row, C: tl.constexpr, C_PAD: tl.constexpr):
    parts = tl.arange(0, C_PAD)
    return tl.max(tl.load(value_ptr + row * C + parts, mask=parts < C, other=float("-inf")), 0)


@triton.jit
def ordered(x):
    """Map fp32 to uint32 so that order is kept."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _above(
    logits_ptr,
    past,
    row,
    V,
    bound,
    floor,
    top,
    temperature,
    BY_MASS: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count, or weigh by probability, the logits above `bound` and not below `floor` (both ordered bits)."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + offs
        x = scores_at(logits_ptr, row, at, V, past, HAS_PENALTIES)
        key = ordered(x)
        is_in = (key > bound) & (key >= floor) & (at < V)
        if BY_MASS:
            total += tl.where(is_in, tl.exp((x - top) / temperature), 0.0)
        else:
            total += tl.where(is_in, 1.0, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _spread(
    logits_ptr,
    past,
    row,
    V,
    low,
    width,
    HAS_PENALTIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return how far apart the scores are whose ordered bits lie in [low, low + width); 0 for one score or none."""
    offs = tl.arange(0, BLOCK)
    least = tl.full([BLOCK], 0xFFFFFFFF, tl.uint32)
    most = tl.zeros([BLOCK], tl.uint32)
    for start in range(0, V, BLOCK):
        at = start + offs
        x = scores_at(logits_ptr, row, at, V, past, HAS_PENALTIES)
        key = ordered(x)
        is_in = (key >= low) & (key - low < width) & (at < V)
        least = tl.minimum(least, tl.where(is_in, key - low, 0xFFFFFFFF))
        most = tl.maximum(most, tl.where(is_in, key - low, 0))
    least, most = tl.min(least, 0), tl.max(most, 0)
    return tl.where(most > least, most - least, 0)


@triton.jit
def _floor(
    logits_ptr,
    past,
    row,
    V,
    target,
    kept,
    top,
    temperature,
    BY_MASS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the greatest bound that still has the target, a count or a mass, at and above it."""
    low = tl.zeros([], tl.uint32)
    bit = tl.full([], 1 << 31, tl.uint32)
    last_bit = tl.full([], 1 << LOW_BITS, tl.uint32)
    # The greatest bound that still has the target above it is just below the floor.
    while bit >= last_bit:
        trial = low + bit - 1
        found = _above(
            logits_ptr, past, row, V, trial, kept, top, temperature, BY_MASS, HAS_PENALTIES, BLOCK
        )
        low = tl.where(found >= target, low + bit, low)
        if HAS_PENALTIES and LOW_BITS > 0:
            # Penalised scores have low bits. They matter if the floor was found among several scores.
            if past[1] & (bit == (1 << LOW_BITS)):
                if _spread(logits_ptr, past, row, V, low, bit, HAS_PENALTIES, BLOCK) > 0:
                    last_bit = tl.full([], 1, tl.uint32)
        bit = bit >> 1
    return low


@triton.jit
def floors_kernel(
    logits_ptr,
    tally_ptr,
    value_ptr,
    slots_ptr,
    params_ptr,
    floor_ptr,
    V,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
    TALLY_BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write floor [R] as ordered bits; logits have `LOW_BITS` low bits that are always zero, penalised ones none.

    The tally is [R,V] if TALLY_BY_ROW, else [slots,V].
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    params = params_ptr + slot * 32
    temperature = tl.load(params).to(tl.float32, bitcast=True)
    top_k = tl.load(params + 1)
    top_p = tl.load(params + 2).to(tl.float32, bitcast=True)
    min_p = tl.load(params + 3).to(tl.float32, bitcast=True)
    top = row_max(value_ptr, row, C, C_PAD)
    tally_row = row if TALLY_BY_ROW else slot.to(tl.int64)
    past = past_of(tally_ptr + tally_row * V, params, HAS_PENALTIES)
    floor = tl.zeros([], tl.uint32)
    if temperature > 0.0:
        if min_p > 0.0:
            floor = ordered(top + temperature * tl.log(min_p) * 1.0000001)
        if (top_k > 0) & (top_k < V):
            low = _floor(
                logits_ptr,
                past,
                row,
                V,
                top_k,
                floor,
                top,
                temperature,
                False,
                LOW_BITS,
                HAS_PENALTIES,
                BLOCK,
            )
            floor = tl.maximum(floor, low)
        if top_p < 1.0:
            whole = _above(
                logits_ptr, past, row, V, 0, floor, top, temperature, True, HAS_PENALTIES, BLOCK
            )
            low = _floor(
                logits_ptr,
                past,
                row,
                V,
                top_p * whole,
                floor,
                top,
                temperature,
                True,
                LOW_BITS,
                HAS_PENALTIES,
                BLOCK,
            )
            floor = tl.maximum(floor, low)
        floor = tl.minimum(floor, ordered(top))
    tl.store(floor_ptr + row, floor.to(tl.int32, bitcast=True))
