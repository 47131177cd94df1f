"""Sampling kernels: logits in, one token a row out, on the device. Follow `inference.sampler` and `inference.noise`.

maxima    best token of each part of the vocabulary, and NaN where a part is broken
floors    the least logit that top-k, top-p and min-p keep (`inference.kernels.floors`)
draws     rows with a temperature: best of (logit - max) / temperature + Gumbel noise in each part
commit    merge the parts, look for end tokens, leave the token for the next step and for the host

Wherever logits are loaded, rows with penalties get theirs (`inference.kernels.penalties`); without HAS_PENALTIES
nothing of that is compiled.

Under tensor parallel the logits are some columns of the vocabulary: column 0 is token START, and the parts that are
merged are all ranks'.

R rows that sample   V vocabulary, or the columns here   C parts of it   P fields of a slot (`inference.slot_params`)
"""

import triton
import triton.language as tl

from inference.kernels.floors import ordered, row_max
from inference.kernels.penalties import past_of, scores_at


@triton.jit
def maxima_kernel(
    logits_ptr,
    tally_ptr,
    slots_ptr,
    params_ptr,
    value_ptr,
    index_ptr,
    V,
    START,
    PART: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logits [R,V], tally [slots,V] -> value, index [R,C]; the lowest index wins a tie."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots_ptr + row).to(tl.int64) if HAS_PENALTIES else row
    past = past_of(tally_ptr + slot * V, params_ptr + slot * 32, HAS_PENALTIES)
    offs = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK], tl.int32)
    is_bad = tl.zeros([BLOCK], tl.int32)
    for start in range(part * PART, part * PART + PART, BLOCK):
        at = start + offs
        x = scores_at(logits_ptr, row, at, V, past, HAS_PENALTIES)
        is_bad = is_bad | ((x != x) | (x == float("inf"))).to(tl.int32)
        is_better = x > best
        best = tl.where(is_better, x, best)
        best_at = tl.where(is_better, at, best_at)
    top = tl.max(best, 0)
    top_at = tl.min(tl.where(best == top, best_at, 0x7FFFFFFF), 0)
    top = tl.where(tl.max(is_bad, 0) > 0, float("nan"), top)
    place = row * tl.num_programs(1) + part
    tl.store(value_ptr + place, top)
    tl.store(index_ptr + place, top_at + START)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def draws_kernel(
    logits_ptr,
    tally_ptr,
    value_ptr,
    slots_ptr,
    positions_ptr,
    params_ptr,
    floor_ptr,
    draw_value_ptr,
    draw_index_ptr,
    V,
    START,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    PART: tl.constexpr,
    HAS_FLOORS: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logits [R,V], params [slots,P] -> draw value, index of the rows that draw, a column for each program."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    params = params_ptr + slot * 32
    temperature = tl.load(params).to(tl.float32, bitcast=True)
    if temperature == 0.0:
        return
    low = tl.load(params + 4).to(tl.uint32, bitcast=True)
    high = tl.load(params + 5).to(tl.uint32, bitcast=True)
    position = tl.load(positions_ptr + row).to(tl.uint32, bitcast=True)
    a = _mix(low + 0x9E3779B9)
    key_0 = _mix(position + _mix(high + a))
    key_1 = _mix(key_0 ^ (a + 0x85EBCA6B))
    top = row_max(value_ptr, row, C, C_PAD)
    past = past_of(tally_ptr + slot.to(tl.int64) * V, params, HAS_PENALTIES)
    offs = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK], tl.int32)
    if HAS_FLOORS:
        floor = tl.load(floor_ptr + row).to(tl.uint32, bitcast=True)
    for start in range(part * PART, part * PART + PART, BLOCK):
        at = start + offs
        x = scores_at(logits_ptr, row, at, V, past, HAS_PENALTIES)
        bits = _mix(_mix((at + START).to(tl.uint32) ^ key_0) + key_1)
        uniform = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        uniform = tl.minimum(uniform, 0.9999999403953552)
        # log1p(-u): log(1 - u) loses small u, so correct it by the rounding of 1 - u.
        rest = 1.0 - uniform
        lost = (1.0 - rest) - uniform
        log_rest = tl.where(rest == 1.0, -uniform, tl.log(rest) + lost / rest)
        score = (x - top) / temperature - tl.log(-log_rest)
        if HAS_FLOORS:
            score = tl.where(ordered(x) >= floor, score, float("-inf"))
        is_better = score > best
        best = tl.where(is_better, score, best)
        best_at = tl.where(is_better, at, best_at)
    winner = tl.max(best, 0)
    winner_at = tl.min(tl.where(best == winner, best_at, 0x7FFFFFFF), 0)
    place = row * tl.num_programs(1) + part
    tl.store(draw_value_ptr + place, winner)
    tl.store(draw_index_ptr + place, winner_at + START)


@triton.jit
def commit_kernel(
    value_ptr,
    index_ptr,
    draw_value_ptr,
    draw_index_ptr,
    slots_ptr,
    num_samples_ptr,
    params_ptr,
    last_token_ptr,
    result_ptr,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    HAS_DRAWS: tl.constexpr,
):
    """Parts [R,C], params [slots,P] -> last_token [slots], result [R]."""
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(num_samples_ptr):
        return
    slot = tl.load(slots_ptr + row)
    parts = tl.arange(0, C_PAD)
    in_parts = parts < C
    place = row * C + parts
    value = tl.load(value_ptr + place, mask=in_parts, other=float("-inf"))
    index = tl.load(index_ptr + place, mask=in_parts, other=0)
    is_bad = tl.max((value != value).to(tl.int32), 0) > 0
    is_bad = is_bad | (tl.max(value, 0) == float("-inf"))
    if HAS_DRAWS:
        draws = tl.load(params_ptr + slot * 32) != 0
        draw_value = tl.load(draw_value_ptr + place, mask=in_parts & draws, other=float("-inf"))
        draw_index = tl.load(draw_index_ptr + place, mask=in_parts & draws, other=0)
        value = tl.where(draws, draw_value, value)
        index = tl.where(draws, draw_index, index)
    token = tl.min(tl.where(value == tl.max(value, 0), index, 0x7FFFFFFF), 0)
    token = tl.where(is_bad, 0, token)
    tl.store(last_token_ptr + slot, token)
    stops = tl.load(params_ptr + slot * 32 + 16 + tl.arange(0, 16))
    is_stop = tl.max((stops == token).to(tl.int32), 0) > 0
    result = tl.where(is_bad, -1, tl.where(is_stop, token | (1 << 30), token))
    tl.store(result_ptr + row, result)
