"""Floors: the least logit that top-k, top-p and min-p keep, found without a sort in a few passes over a row.

One program a row. A range of ordered bits holds the floor: it is made small, the scores in it are copied to scratch,
and the floor is found among these by bisection over its bits.

survey    one pass: the best score of each of L * W groups of columns, and the mass of all. The k-th best of the
          groups' best is a bound that k scores reach, so the floor is not below it; likewise by mass for top-p
gather    one pass: copy the scores in the range. Each lane has places of its own, so that no lane waits for another
narrow    if one lane's places are too few: one pass weighs four bounds in the range, and a fifth of it is left

Rows with a peak need the first two. What top-k left is in scratch for top-p. A score's weight is 1 for top-k, and for
top-p its probability over the best one's.

R rows that sample   V vocabulary   C parts of it   P fields of a slot (`inference.slot_params`)
L lanes   W neighbouring columns that a lane has of each L * W   D places of a lane in scratch
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
    """Map fp32 to uint32 so that order is kept; both zeros become one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    flips = (bits >> 31).to(tl.uint32, bitcast=True) | 0x80000000
    return bits.to(tl.uint32, bitcast=True) ^ flips


@triton.jit
def _scores(line, start, HAS_PENALTIES: tl.constexpr, L: tl.constexpr, W: tl.constexpr):
    """Return the scores [L,W] of the columns that the lanes have of those from `start` on.

    Past the last they are -inf: they have no mass, and top-k, which is less than V, is reached without them.
    """
    logits_ptr, row, V, past = line
    at = start + tl.arange(0, L)[:, None] * W + tl.arange(0, W)[None, :]
    return scores_at(logits_ptr, row, at, V, past, HAS_PENALTIES)


@triton.jit
def _weights(x, scale):
    """Return what each score counts for; scale: the best score, what 1 less is in powers of two, whether by mass."""
    top, rate, by_mass = scale
    return tl.where(by_mass, tl.exp2((x - top) * rate), 1.0)


@triton.jit
def _heavy(key, weights, bound):
    """Return each lane's weight at and above a bound."""
    return tl.sum(tl.where(key >= bound, weights, 0.0), 1)


@triton.jit
def _survey(
    line,
    floor,
    scale,
    HAS_PENALTIES: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
):
    """Return the best score of every L * W-th column [L,W]; by mass, that of all scores not below the floor."""
    best = tl.full([L, W], float("-inf"), tl.float32)
    mass = tl.zeros([L], tl.float32)
    for start in range(0, line[2], L * W):
        x = _scores(line, start, HAS_PENALTIES, L, W)
        best = tl.maximum(best, x)
        if scale[2]:
            mass += _heavy(ordered(x), _weights(x, scale), floor)
    return best, tl.sum(mass, 0)


@triton.jit
def _greatest(key, weights, target, low, high, last_bit):
    """Return the greatest bound in [low, high), in steps of that bit, that keys of the target's weight reach; else low."""
    bit = tl.full([], 1 << 31, tl.uint32)
    while (bit >= high - low) & (bit >= last_bit):
        bit = bit >> 1
    while bit >= last_bit:
        found = tl.sum(_heavy(key, weights, low + bit), 0)
        # Past the range the sum of low and bit may be past the last number.
        low = tl.where((found >= target) & (bit < high - low), low + bit, low)
        bit = bit >> 1
    return low


@triton.jit
def _gather(
    line,
    low,
    high,
    scratch,
    HAS_PENALTIES: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
):
    """Copy the scores in [low, high) to scratch [L,D]; return each lane's count, also of those it has no place for."""
    lane = tl.arange(0, L)
    count = tl.zeros([L], tl.int32)
    for start in range(0, line[2], L * W):
        x = _scores(line, start, HAS_PENALTIES, L, W)
        bits = x.to(tl.int32, bitcast=True)
        for i in tl.static_range(W):
            # A lane's i-th score. Its thread has it in a register, so that the sum costs nothing.
            is_ith = tl.arange(0, W)[None, :] == i
            x = tl.sum(tl.where(is_ith, bits, 0), 1).to(tl.float32, bitcast=True)
            key = ordered(x)
            is_in = (key >= low) & (key < high)
            tl.store(scratch + lane * D + count, x, mask=is_in & (count < D))
            count += is_in.to(tl.int32)
    tl.debug_barrier()  # other threads than those that stored will load
    return count


@triton.jit
def _cut(low, high, above, bound, found, target):
    """Move an end of the range to a bound, given the weight at and above it; `above` is the upper end's. By rising bounds."""
    is_enough = found >= target
    is_lower = (is_enough == 0) & (bound < high)
    low = tl.where(is_enough, bound, low)
    return low, tl.where(is_lower, bound, high), tl.where(is_lower, found, above)


@triton.jit
def _narrow(
    line,
    low,
    high,
    above,
    target,
    scale,
    HAS_PENALTIES: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
):
    """Return a smaller range in [low, high), which is two or more wide, and the weight above it.

    Bounds lie within, so that any row's range shrinks, a broken one's too.
    """
    step = tl.maximum((high - low) // 5, 1)
    bound_1 = low + step
    bound_2 = tl.minimum(bound_1 + step, high - 1)
    bound_3 = tl.minimum(bound_2 + step, high - 1)
    bound_4 = tl.minimum(bound_3 + step, high - 1)
    found_1 = tl.zeros([L], tl.float32)
    found_2 = tl.zeros([L], tl.float32)
    found_3 = tl.zeros([L], tl.float32)
    found_4 = tl.zeros([L], tl.float32)
    for start in range(0, line[2], L * W):
        x = _scores(line, start, HAS_PENALTIES, L, W)
        key = ordered(x)
        weights = _weights(x, scale)
        found_1 += _heavy(key, weights, bound_1)
        found_2 += _heavy(key, weights, bound_2)
        found_3 += _heavy(key, weights, bound_3)
        found_4 += _heavy(key, weights, bound_4)
    low, high, above = _cut(low, high, above, bound_1, tl.sum(found_1, 0), target)
    low, high, above = _cut(low, high, above, bound_2, tl.sum(found_2, 0), target)
    low, high, above = _cut(low, high, above, bound_3, tl.sum(found_3, 0), target)
    return _cut(low, high, above, bound_4, tl.sum(found_4, 0), target)


@triton.jit
def _bound_by_tail(V, mass, top_p, top, temperature):
    """Return ordered bits that top-p's floor is not below: even V scores below them weigh too little to be needed."""
    # The factor is for roundings of the depth; that of the bound itself does not move it past a score.
    depth = tl.log(V / ((1.0 - top_p) * 0.99 * mass))
    return ordered(top - temperature * depth)


@triton.jit
def _search(
    line,
    floor,
    asked,
    scale,
    scratch,
    HAS_PENALTIES: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
):
    """Return a range that has the floor, the weight to be found in it, and how many of its scores each lane has.

    The scores are in scratch, unless a lane has more than its D places; then the range is one key.
    """
    top_k, top_p, temperature = asked
    best, mass = _survey(line, floor, scale, HAS_PENALTIES, L, W)
    high = ordered(scale[0]) + 1
    low = floor
    target = top_k.to(tl.float32)
    if scale[2]:
        target = top_p * mass
        low = tl.maximum(low, _bound_by_tail(line[2], mass, top_p, scale[0], temperature))
    low = tl.minimum(low, high - 1)
    low = _greatest(ordered(best), _weights(best, scale), target, low, high, 1 << 16)
    above = tl.zeros([], tl.float32)
    count = _gather(line, low, high, scratch, HAS_PENALTIES, L, W, D)
    while (tl.max(count, 0) > D) & (high - low > 1):
        low, high, above = _narrow(line, low, high, above, target, scale, HAS_PENALTIES, L, W)
        count = _gather(line, low, high, scratch, HAS_PENALTIES, L, W, D)
    return low, high, target - above, count


@triton.jit
def _gathered(scratch, count, scale, L: tl.constexpr, D: tl.constexpr):
    """Return the keys [L,D] of the scores in scratch, and their weights; both 0 in places without one."""
    place = tl.arange(0, D)[None, :]
    is_there = place < count[:, None]
    x = tl.load(scratch + tl.arange(0, L)[:, None] * D + place, mask=is_there, other=0.0)
    return tl.where(is_there, ordered(x), 0), tl.where(is_there, _weights(x, scale), 0.0)


@triton.jit
def floors_kernel(
    logits_ptr,
    tally_ptr,
    value_ptr,
    slots_ptr,
    params_ptr,
    floor_ptr,
    scratch_ptr,
    V,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
    TALLY_BY_ROW: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
):
    """Write floor [R] as ordered bits; scratch [R,L,D] fp32 is written and read.

    The tally is [R,V] if TALLY_BY_ROW, else [slots,V]. A broken row's floor is any.
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
    line = (logits_ptr, row, V, past)
    asked = (top_k, top_p, temperature)
    scratch = scratch_ptr + row * (L * D)
    floor = tl.zeros([], tl.uint32)
    if temperature > 0.0:
        if min_p > 0.0:
            floor = ordered(top + temperature * tl.log(min_p) * 1.0000001)
        log2_e = tl.full([], 1.4426950408889634, tl.float32)
        rate = tl.div_rn(log2_e, tl.maximum(temperature, 1e-37))  # finite: 0 times it is 0
        last_bit = tl.full([], 1, tl.uint32)
        if logits_ptr.dtype.element_ty == tl.bfloat16:
            if past[1] == 0:  # penalised scores have all bits
                last_bit = tl.full([], 1 << 16, tl.uint32)
        count = tl.zeros([L], tl.int32)
        has_all = 0  # 1 if scratch has all scores not below the floor
        for goal in range(2):
            scale = (top, rate, goal == 1)
            is_asked = (top_k > 0) & (top_k < V)
            if goal == 1:
                is_asked = top_p < 1.0
            if is_asked:
                high = ordered(top) + 1
                target = tl.zeros([], tl.float32)
                had_all = has_all
                if has_all == 0:
                    floor, high, target, count = _search(
                        line, floor, asked, scale, scratch, HAS_PENALTIES, L, W, D
                    )
                is_gathered = tl.max(count, 0) <= D
                if is_gathered:
                    key, weights = _gathered(scratch, count, scale, L, D)
                    if had_all == 1:
                        target = top_p * tl.sum(_heavy(key, weights, floor), 0)
                    floor = _greatest(key, weights, target, floor, high, last_bit)
                has_all = (is_gathered & (high > ordered(top))).to(tl.int32)
        floor = tl.minimum(floor, ordered(top))
    tl.store(floor_ptr + row, floor.to(tl.int32, bitcast=True))
