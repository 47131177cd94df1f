"""Sampling on the device: what `inference.sampler` does, but for log-probabilities.

Under tensor parallel each rank searches its columns and the ranks gather the best of each part: a few numbers
a row. Floors (top-k, top-p, min-p) need all columns: ranks exchange them so that each finds the floors of some
rows, with the kernel that one rank uses.

R rows that sample   V vocabulary   W columns of a rank (V if alone)   C parts of these   N ranks
"""

import torch
import triton
from torch import Tensor

from inference.batch import NUM_SAMPLES
from inference.kernels.floors import floors_kernel
from inference.kernels.penalties import bans_kernel, tally_kernel
from inference.kernels.sampling import commit_kernel, draws_kernel, maxima_kernel
from inference.tensor_parallel import TensorParallel
from inference.vocabulary import PartitionedVocabulary, WholeVocabulary

_PARTS = 8
"""Programs over one row's vocabulary."""


def sample(
    logits_RW: Tensor,
    slots_R: Tensor,
    positions_R: Tensor,
    counts: Tensor,
    params: Tensor,
    last_token: Tensor,
    result_R: Tensor,
    *,
    has_draws: bool,
    has_floors: bool,
    has_bans: bool = False,
    tally: Tensor | None = None,
    vocabulary: WholeVocabulary | None = None,
    ranks: TensorParallel | None = None,
) -> None:
    """Choose every row's token as `inference.sampler` does; leave it in `last_token` and `result_R`.

    With `has_bans`, logits of banned tokens are overwritten. Rows with penalties need a `tally` [slots,W]
    (`inference.tally`), in which their tokens are counted; without one no row may have penalties.
    """
    ranks = ranks or TensorParallel.alone()
    start = 0
    if isinstance(vocabulary, PartitionedVocabulary):
        logits_RW, start = vocabulary.padded(logits_RW), vocabulary.start
    num_rows, width = logits_RW.shape
    block = 2048
    part = triton.cdiv(triton.cdiv(width, _PARTS), block) * block
    num_parts = triton.cdiv(width, part)
    value = logits_RW.new_empty(num_rows, num_parts, dtype=torch.float32)
    index = logits_RW.new_empty(num_rows, num_parts, dtype=torch.int32)
    grid = (num_rows, num_parts)
    has_penalties = tally is not None
    past = params if tally is None else tally
    if has_bans:
        bans_kernel[(num_rows,)](logits_RW, slots_R, positions_R, params, width, start, num_warps=1)
    maxima_kernel[grid](
        logits_RW,
        past,
        slots_R,
        params,
        value,
        index,
        width,
        start,
        PART=part,
        HAS_PENALTIES=has_penalties,
        BLOCK=block,
        num_warps=4,
    )
    value, index = _side_by_side(value, ranks), _side_by_side(index, ranks)
    all_parts = value.shape[1]
    pad = max(2, triton.next_power_of_2(all_parts))
    draw_value, draw_index = value, index
    if has_draws:
        draw_value = value.new_empty(num_rows, num_parts)
        draw_index = index.new_empty(num_rows, num_parts)
        floors = index
        if has_floors:
            floors = _floors(logits_RW, tally, value, slots_R, params, pad, vocabulary, ranks)
        draws_kernel[grid](
            logits_RW,
            past,
            value,
            slots_R,
            positions_R,
            params,
            floors,
            draw_value,
            draw_index,
            width,
            start,
            C=all_parts,
            C_PAD=pad,
            PART=part,
            HAS_FLOORS=has_floors,
            HAS_PENALTIES=has_penalties,
            BLOCK=block,
            num_warps=4,
        )
        draw_value = _side_by_side(draw_value, ranks)
        draw_index = _side_by_side(draw_index, ranks)
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
        C=all_parts,
        C_PAD=pad,
        HAS_DRAWS=has_draws,
        num_warps=1,
    )
    if tally is not None:
        tally_kernel[(num_rows,)](
            result_R, slots_R, counts[NUM_SAMPLES:], params, tally, width, start, num_warps=1
        )


def _side_by_side(parts_RC: Tensor, ranks: TensorParallel) -> Tensor:
    """[R,C] of each rank -> [R,NC]"""
    if ranks.size == 1:
        return parts_RC
    return ranks.gather(parts_RC).transpose(0, 1).flatten(1).contiguous()


def _floors(
    logits_RW: Tensor,
    tally: Tensor | None,
    value: Tensor,
    slots_R: Tensor,
    params: Tensor,
    pad: int,
    vocabulary: WholeVocabulary | None,
    ranks: TensorParallel,
) -> Tensor:
    """Return the rows' floors as ordered bits, each found by one rank from the whole row."""
    num_rows = logits_RW.shape[0]
    if vocabulary is None or ranks.size == 1:
        return _floors_of(logits_RW, tally, value, slots_R, params, pad)
    whole = _whole_rows(logits_RW, vocabulary, ranks)
    if tally is not None:
        tally = _whole_rows(tally[slots_R.long()], vocabulary, ranks)
    share = whole.shape[0]
    mine = torch.arange(share, device=whole.device) + ranks.rank * share
    mine = mine.clamp(max=num_rows - 1)  # rows that pad the last rank's share are not looked at
    floors = _floors_of(whole, tally, value[mine], slots_R[mine], params, pad, tally_by_row=True)
    return ranks.gather(floors).flatten()[:num_rows]


def _whole_rows(parts_RW: Tensor, vocabulary: WholeVocabulary, ranks: TensorParallel) -> Tensor:
    """Give every rank all columns of some rows, [R / N,V]; zeros pad the last one's."""
    num_rows = parts_RW.shape[0]
    share = triton.cdiv(num_rows, ranks.size)
    missing = share * ranks.size - num_rows
    parts_RW = torch.nn.functional.pad(parts_RW, (0, 0, 0, missing))
    # As bytes: not every library knows every element type.
    sent = parts_RW.view(torch.uint8).view(ranks.size, share, -1)
    whole = ranks.exchange(sent).view(parts_RW.dtype)
    return whole.transpose(0, 1).flatten(1)[:, : vocabulary.size].contiguous()


def _floors_of(
    logits_RV: Tensor,
    tally: Tensor | None,
    value: Tensor,
    slots_R: Tensor,
    params: Tensor,
    pad: int,
    tally_by_row: bool = False,
) -> Tensor:
    num_rows, vocab = logits_RV.shape
    floors = logits_RV.new_empty(num_rows, dtype=torch.int32)
    floors_kernel[(num_rows,)](
        logits_RV,
        params if tally is None else tally,
        value,
        slots_R,
        params,
        floors,
        vocab,
        C=value.shape[1],
        C_PAD=pad,
        LOW_BITS=16 if logits_RV.dtype == torch.bfloat16 else 0,
        HAS_PENALTIES=tally is not None,
        TALLY_BY_ROW=tally_by_row,
        BLOCK=4096,
        num_warps=8,
    )
    return floors
