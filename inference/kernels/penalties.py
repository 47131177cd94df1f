"""What a row's past does to its logits, on the device: penalties and bans, as `inference.sampler` has them.

penalised  scores of seen tokens, worked out wherever a kernel loads logits: nothing of vocabulary size is written
bans       end tokens of a row that has not reached min_tokens yet are set to -inf, in place
tally      count the tokens just chosen; `inference.tally` says what a tally holds

R rows that sample   W columns here, from token START on   P fields of a slot (`inference.slot_params`)
"""

import triton
import triton.language as tl


@triton.jit
def past_of(tally, params, HAS_PENALTIES: tl.constexpr):
    """Return what `scores_at` needs of a row: its part of a tally, whether it counts, its penalties."""
    if HAS_PENALTIES:
        repetition = tl.load(params + 6).to(tl.float32, bitcast=True)
        presence = tl.load(params + 7).to(tl.float32, bitcast=True)
        frequency = tl.load(params + 8).to(tl.float32, bitcast=True)
        past = (tally, tl.load(params + 10) != 0, repetition, presence, frequency)
    else:
        past = (tally, False, 1.0, 0.0, 0.0)
    return past


@triton.jit
def scores_at(logits_ptr, row, at, W, past, HAS_PENALTIES: tl.constexpr):
    """Load a row's logits of columns `at`, -inf past the last; return their fp32 scores, with the reference's roundings."""
    x = tl.load(logits_ptr + row * W + at, mask=at < W, other=float("-inf")).to(tl.float32)
    if HAS_PENALTIES:
        tally, is_tallied, repetition, presence, frequency = past
        if is_tallied:
            seen = tl.load(tally + at, mask=at < W, other=0).to(tl.int32)
            if repetition != 1.0:
                scaled = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
                x = tl.where(seen != 0, scaled, x)
            count = seen & 0x7FFF
            if frequency != 0.0:
                # The product is exact in fp64 and rounded once: no compiler can fuse it into the sum.
                product = (count.to(tl.float64) * frequency.to(tl.float64)).to(tl.float32)
                x = tl.where(count > 0, x - (product + presence), x)
            else:
                x = tl.where(count > 0, x - presence, x)
    return x


@triton.jit
def bans_kernel(logits_ptr, slots_ptr, positions_ptr, params_ptr, W, START):
    """logits [R,W], positions [R] (of the token to be chosen) -> logits with end tokens banned."""
    row = tl.program_id(0).to(tl.int64)
    params = params_ptr + tl.load(slots_ptr + row) * 32
    is_early = tl.load(positions_ptr + row) < tl.load(params + 9)
    stops = tl.load(params + 16 + tl.arange(0, 16))
    column = stops - START
    is_here = is_early & (stops >= 0) & (column >= 0) & (column < W)
    place = logits_ptr + row * W + column
    logits = tl.load(place, mask=is_here, other=0.0)
    # A broken logit stays, so that its row does not pass for a whole one.
    is_whole = logits.to(tl.float32) < float("inf")
    tl.store(place, tl.full([16], float("-inf"), tl.float32), mask=is_here & is_whole)


@triton.jit
def tally_kernel(result_ptr, slots_ptr, num_samples_ptr, params_ptr, tally_ptr, W, START):
    """result [R] -> tally [slots,W] with the chosen tokens counted; a count stays at its most."""
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(num_samples_ptr):
        return
    slot = tl.load(slots_ptr + row)
    result = tl.load(result_ptr + row)
    column = (result & 0x3FFFFFFF) - START
    is_here = (result >= 0) & (tl.load(params_ptr + slot * 32 + 10) != 0)
    is_here = is_here & (column >= 0) & (column < W)
    place = tally_ptr + slot.to(tl.int64) * W + column
    seen = tl.load(place, mask=is_here, other=0).to(tl.int32)
    is_full = (seen & 0x7FFF) == 0x7FFF
    tl.store(place, (seen + 1).to(tl.int16), mask=is_here & (is_full == 0))
