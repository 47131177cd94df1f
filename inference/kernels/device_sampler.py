"""Sampling on the device: what `inference.sampler` does, for rows that need no tokens of the past.

R rows that sample   V vocabulary
"""

import torch
import triton
from torch import Tensor

from inference.batch import NUM_SAMPLES
from inference.kernels.sampling import commit_kernel, draws_kernel, floors_kernel, maxima_kernel

_PARTS = 8
"""Programs over one row's vocabulary."""


def sample(
    logits_RV: Tensor,
    slots_R: Tensor,
    positions_R: Tensor,
    counts: Tensor,
    params: Tensor,
    last_token: Tensor,
    result_R: Tensor,
    *,
    has_draws: bool,
    has_floors: bool,
) -> None:
    """Choose every row's token as `inference.sampler` does; leave it in `last_token` and `result_R`."""
    num_rows, vocab = logits_RV.shape
    block = 2048
    part = triton.cdiv(triton.cdiv(vocab, _PARTS), block) * block
    num_parts = triton.cdiv(vocab, part)
    pad = max(2, triton.next_power_of_2(num_parts))
    value = logits_RV.new_empty(num_rows, num_parts, dtype=torch.float32)
    index = logits_RV.new_empty(num_rows, num_parts, dtype=torch.int32)
    grid = (num_rows, num_parts)
    maxima_kernel[grid](logits_RV, value, index, vocab, PART=part, BLOCK=block, num_warps=4)
    draw_value, draw_index = value, index
    if has_draws:
        draw_value, draw_index = torch.empty_like(value), torch.empty_like(index)
        floors = index
        if has_floors:
            floors = logits_RV.new_empty(num_rows, dtype=torch.int32)
            floors_kernel[(num_rows,)](
                logits_RV,
                value,
                slots_R,
                params,
                floors,
                vocab,
                C=num_parts,
                C_PAD=pad,
                LOW_BITS=16 if logits_RV.dtype == torch.bfloat16 else 0,
                BLOCK=4096,
                num_warps=8,
            )
        draws_kernel[grid](
            logits_RV,
            value,
            slots_R,
            positions_R,
            params,
            floors,
            draw_value,
            draw_index,
            vocab,
            C=num_parts,
            C_PAD=pad,
            PART=part,
            HAS_FLOORS=has_floors,
            BLOCK=block,
            num_warps=4,
        )
    commit_kernel[(num_rows,)](
        value,
        index,
        draw_value,
        draw_index,
        slots_R,
        counts[NUM_SAMPLES:],
        params,
        last_token,
        result_R,
        C=num_parts,
        C_PAD=pad,
        HAS_DRAWS=has_draws,
        num_warps=1,
    )
