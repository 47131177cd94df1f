"""Log-probabilities on the device: launches around a step's sampling.

R rows that sample   W columns of a rank   C parts of them   N ranks   T most tokens a row can ask for
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from inference.kernels.logprobs import chosen_kernel, leaders_kernel, merge_kernel
from inference.sampling import MAX_LOGPROBS as T
from inference.tensor_parallel import TensorParallel

_PARTS = 8
_BLOCK = 2048


class Leaders(NamedTuple):
    """What a rank knows of its columns."""

    sum_RC: Tensor
    value_RCT: Tensor
    index_RCT: Tensor


def leaders_of(logits_RW: Tensor, start: int, slots_R: Tensor, params: Tensor) -> Leaders:
    """Find what log-probabilities take, before anything changes the logits. Rows that do not ask stay unwritten."""
    num_rows, width = logits_RW.shape
    part = triton.cdiv(triton.cdiv(width, _PARTS), _BLOCK) * _BLOCK
    num_parts = triton.cdiv(width, part)
    found = Leaders(
        logits_RW.new_empty(num_rows, num_parts, dtype=torch.float32),
        logits_RW.new_empty(num_rows, num_parts, T, dtype=torch.float32),
        logits_RW.new_empty(num_rows, num_parts, T, dtype=torch.int32),
    )
    leaders_kernel[(num_rows, num_parts)](
        logits_RW,
        slots_R,
        params,
        *found,
        width,
        start,
        T=T,
        PART=part,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return found


def write_logprobs(
    leaders: Leaders,
    logits_RW: Tensor,
    start: int,
    result_R: Tensor,
    slots_R: Tensor,
    params: Tensor,
    out: Tensor,
    ranks: TensorParallel,
) -> None:
    """Leave the rows' log-probabilities in `out` [at least R,1+2T], as `merge_kernel` lays them out."""
    num_rows, width = logits_RW.shape
    chosen_R1 = logits_RW.new_empty(num_rows, 1, dtype=torch.float32)
    chosen_kernel[(num_rows,)](logits_RW, result_R, chosen_R1, width, start, num_warps=1)
    sums, values, indices = (side_by_side(found, ranks) for found in leaders)
    num_parts = sums.shape[1]
    merge_kernel[(num_rows,)](
        sums,
        values,
        indices,
        side_by_side(chosen_R1, ranks),
        slots_R,
        params,
        out,
        C=num_parts,
        C_PAD=max(2, triton.next_power_of_2(num_parts)),
        N=ranks.size,
        N_PAD=max(2, triton.next_power_of_2(ranks.size)),
        T=T,
        CT_PAD=triton.next_power_of_2(num_parts * T),
        num_warps=4,
    )


def side_by_side(parts_RC: Tensor, ranks: TensorParallel) -> Tensor:
    """[R,C,...] of each rank -> [R,NC,...]"""
    if ranks.size == 1:
        return parts_RC
    return ranks.gather(parts_RC).transpose(0, 1).flatten(1, 2).contiguous()
