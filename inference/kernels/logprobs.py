"""Log-probabilities on the device: of the model's own distribution, before bans, penalties and temperature.

leaders   of each part of the vocabulary: the log of its summed exponentials, and its most likely tokens in order
chosen    the logit of the token that was chosen, where this rank has it
merge     the parts' leaders and sums -> log-probabilities, for the host

Only rows that ask are looked at. The lower id comes first of tokens that tie.

R rows that sample   W columns here, from token START on   C parts of them, of all ranks once merged   N ranks
T most tokens a row can ask for   P fields of a slot (`inference.slot_params`)
"""

import triton
import triton.language as tl

NO_ID = tl.constexpr(0x7FFFFFFF)
"""In place of a token, where fewer than asked for are possible."""


@triton.jit
def leaders_kernel(
    logits_ptr,
    slots_ptr,
    params_ptr,
    sum_ptr,
    value_ptr,
    index_ptr,
    W,
    START,
    T: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logits [R,W] -> sum [R,C], value and index [R,C,T], of which a row's last ones may stay as they are."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_wanted = tl.load(params_ptr + tl.load(slots_ptr + row) * 32 + 11)
    if num_wanted == 0:
        return
    place = row * tl.num_programs(1) + part
    offs = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(part * PART, part * PART + PART, BLOCK):
        at = start + offs
        x = tl.load(logits_ptr + row * W + at, mask=at < W, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, x)
        total = total * tl.exp(most - larger) + tl.exp(x - larger)
        most = larger
    top = tl.max(most, 0)
    tl.store(sum_ptr + place, top + tl.log(tl.sum(total * tl.exp(most - top), 0)))
    last = tl.full([], float("inf"), tl.float32)
    last_at = tl.full([], -1, tl.int32)
    for nth in range(num_wanted - 1):
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_at = tl.full([BLOCK], NO_ID, tl.int32)
        for start in range(part * PART, part * PART + PART, BLOCK):
            at = start + offs
            x = tl.load(logits_ptr + row * W + at, mask=at < W, other=float("-inf")).to(tl.float32)
            is_next = (x < last) | ((x == last) & (at > last_at))
            is_better = is_next & (x > best)
            best = tl.where(is_better, x, best)
            best_at = tl.where(is_better, at, best_at)
        last = tl.max(best, 0)
        last_at = tl.min(tl.where(best == last, best_at, NO_ID), 0)
        tl.store(value_ptr + place * T + nth, last)
        tl.store(index_ptr + place * T + nth, tl.where(last_at == NO_ID, NO_ID, last_at + START))


@triton.jit
def chosen_kernel(logits_ptr, result_ptr, chosen_ptr, W, START):
    """logits [R,W], result [R] -> chosen [R], -inf where the token's column is not here."""
    row = tl.program_id(0).to(tl.int64)
    result = tl.load(result_ptr + row)
    column = (result & 0x3FFFFFFF) - START
    is_here = (result >= 0) & (column >= 0) & (column < W)
    x = tl.load(logits_ptr + row * W + column, mask=is_here, other=float("-inf"))
    tl.store(chosen_ptr + row, x.to(tl.float32))


@triton.jit
def merge_kernel(
    sum_ptr,
    value_ptr,
    index_ptr,
    chosen_ptr,
    slots_ptr,
    params_ptr,
    out_ptr,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    N: tl.constexpr,
    N_PAD: tl.constexpr,
    T: tl.constexpr,
    CT_PAD: tl.constexpr,
):
    """Parts [R,C], chosen [R,N] -> out [R,1+2T]: the chosen token's, the leaders' (both bits of fp32), their ids."""
    row = tl.program_id(0).to(tl.int64)
    num_wanted = tl.load(params_ptr + tl.load(slots_ptr + row) * 32 + 11)
    if num_wanted == 0:
        return
    parts = tl.arange(0, C_PAD)
    sums = tl.load(sum_ptr + row * C + parts, mask=parts < C, other=float("-inf"))
    top = tl.max(sums, 0)
    whole = top + tl.log(tl.sum(tl.exp(sums - top), 0))
    ranks = tl.arange(0, N_PAD)
    chosen = tl.max(tl.load(chosen_ptr + row * N + ranks, mask=ranks < N, other=float("-inf")), 0)
    out = out_ptr + row * (1 + 2 * T)
    tl.store(out, (chosen - whole).to(tl.int32, bitcast=True))
    places = tl.arange(0, CT_PAD)
    is_there = (places < C * T) & (places % T < num_wanted - 1)
    value = tl.load(value_ptr + row * C * T + places, mask=is_there, other=float("-inf"))
    index = tl.load(index_ptr + row * C * T + places, mask=is_there, other=NO_ID)
    last = tl.full([], float("inf"), tl.float32)
    last_at = tl.full([], -1, tl.int32)
    for nth in range(num_wanted - 1):
        is_next = (value < last) | ((value == last) & (index > last_at))
        left = tl.where(is_next, value, float("-inf"))
        last = tl.max(left, 0)
        last_at = tl.min(tl.where(is_next & (left == last), index, NO_ID), 0)
        tl.store(out + 1 + nth, (last - whole).to(tl.int32, bitcast=True))
        tl.store(out + 1 + T + nth, last_at)
