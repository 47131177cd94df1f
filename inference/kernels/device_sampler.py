"""Sampling on the device: what `inference.sampler` does.

Under tensor parallel each rank searches its columns and the ranks gather the best of each part: a few numbers
a row. Floors (top-k, top-p, min-p) need all columns: ranks exchange them so that each finds the floors of some
rows, with the kernel that one rank uses.

R rows that sample   V vocabulary   W columns of a rank (V if alone)   C parts of these   N ranks
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from inference.batch import NUM_SAMPLES
from inference.kernels.device_logprobs import leaders_of, side_by_side, write_logprobs
from inference.kernels.floors import floors_kernel
from inference.kernels.penalties import bans_kernel, tally_kernel
from inference.kernels.sampling import commit_kernel, draws_kernel, maxima_kernel
from inference.tensor_parallel import TensorParallel
from inference.vocabulary import PartitionedVocabulary, WholeVocabulary

_PARTS = 8
"""Programs over one row's vocabulary."""

_BLOCK = 2048

_LANES, _PLACES = 1024, 8
"""See `kernels.floors`."""

_FLOOR_WARPS = 16


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the kernels are given of a step's rows."""

    logits_RW: Tensor
    start: int
    """Token of the first column."""

    slots_R: Tensor
    positions_R: Tensor
    params: Tensor
    tally: Tensor | None
    vocabulary: WholeVocabulary | None
    ranks: TensorParallel

    @property
    def past(self) -> Tensor:
        """The tally, or what stands in for it where no kernel looks."""
        return self.params if self.tally is None else self.tally

    @property
    def part(self) -> int:
        """Columns of one program."""
        return -(-self.logits_RW.shape[1] // (_PARTS * _BLOCK)) * _BLOCK

    @property
    def grid(self) -> tuple[int, int]:
        """[R,C]"""
        num_rows, width = self.logits_RW.shape
        return num_rows, -(-width // self.part)


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
    logprobs: Tensor | None = None,
    vocabulary: WholeVocabulary | None = None,
    ranks: TensorParallel | None = None,
) -> None:
    """Choose every row's token as `inference.sampler` does; leave it in `last_token` and `result_R`.

    With `has_bans`, logits of banned tokens are overwritten. Rows with penalties need a `tally` [slots,W]
    (`inference.tally`), in which their tokens are counted; without one no row may have penalties. Rows that ask for
    log-probabilities get theirs in `logprobs`, see `kernels.device_logprobs`.
    """
    ranks = ranks or TensorParallel.alone()
    start = 0
    if isinstance(vocabulary, PartitionedVocabulary):
        logits_RW, start = vocabulary.padded(logits_RW), vocabulary.start
    rows = _Rows(logits_RW, start, slots_R, positions_R, params, tally, vocabulary, ranks)
    num_rows, width = logits_RW.shape
    leaders = None if logprobs is None else leaders_of(logits_RW, start, slots_R, params)
    if has_bans:
        bans_kernel[(num_rows,)](logits_RW, slots_R, positions_R, params, width, start, num_warps=1)
    value, index = _maxima(rows)
    drawn = _draws(rows, value, has_floors) if has_draws else (value, index)
    num_samples = counts[NUM_SAMPLES:]
    commit_kernel[(num_rows,)](
        value,
        index,
        *drawn,
        slots_R,
        num_samples,
        params,
        last_token,
        result_R,
        C=value.shape[1],
        C_PAD=_padded(value),
        HAS_DRAWS=has_draws,
        num_warps=1,
    )
    if tally is not None:
        tally_kernel[(num_rows,)](
            result_R, slots_R, num_samples, params, tally, width, start, num_warps=1
        )
    if leaders is not None and logprobs is not None:
        write_logprobs(leaders, logits_RW, start, result_R, slots_R, params, logprobs, ranks)


def _padded(parts_RC: Tensor) -> int:
    return max(2, int(triton.next_power_of_2(parts_RC.shape[1])))


def _maxima(rows: _Rows) -> tuple[Tensor, Tensor]:
    """Return the best value and token of every part, of all ranks."""
    value = rows.logits_RW.new_empty(rows.grid, dtype=torch.float32)
    index = rows.logits_RW.new_empty(rows.grid, dtype=torch.int32)
    maxima_kernel[rows.grid](
        rows.logits_RW,
        rows.past,
        rows.slots_R,
        rows.params,
        value,
        index,
        rows.logits_RW.shape[1],
        rows.start,
        PART=rows.part,
        HAS_PENALTIES=rows.tally is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return side_by_side(value, rows.ranks), side_by_side(index, rows.ranks)


def _draws(rows: _Rows, value: Tensor, has_floors: bool) -> tuple[Tensor, Tensor]:
    """Return the best draw and its token of every part, of all ranks, given all parts' best values."""
    draw_value = value.new_empty(rows.grid)
    draw_index = value.new_empty(rows.grid, dtype=torch.int32)
    floors = _floors(rows, value) if has_floors else draw_index
    draws_kernel[rows.grid](
        rows.logits_RW,
        rows.past,
        value,
        rows.slots_R,
        rows.positions_R,
        rows.params,
        floors,
        draw_value,
        draw_index,
        rows.logits_RW.shape[1],
        rows.start,
        C=value.shape[1],
        C_PAD=_padded(value),
        PART=rows.part,
        HAS_FLOORS=has_floors,
        HAS_PENALTIES=rows.tally is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return side_by_side(draw_value, rows.ranks), side_by_side(draw_index, rows.ranks)


def _floors(rows: _Rows, value: Tensor) -> Tensor:
    """Return the rows' floors as ordered bits, each found by one rank from the whole row."""
    num_rows, vocabulary, ranks = rows.logits_RW.shape[0], rows.vocabulary, rows.ranks
    if vocabulary is None or ranks.size == 1:
        return _floors_of(rows.logits_RW, rows.tally, value, rows.slots_R, rows.params)
    whole = _whole_rows(rows.logits_RW, vocabulary, ranks)
    tally = rows.tally
    if tally is not None:
        tally = _whole_rows(tally[rows.slots_R.long()], vocabulary, ranks)
    share = whole.shape[0]
    mine = torch.arange(share, device=whole.device) + ranks.rank * share
    mine = mine.clamp(max=num_rows - 1)  # rows that pad the last rank's share are not looked at
    slots = rows.slots_R[mine]
    floors = _floors_of(whole, tally, value[mine], slots, rows.params, tally_by_row=True)
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
        logits_RV.new_empty(num_rows, _LANES * _PLACES, dtype=torch.float32),
        vocab,
        C=value.shape[1],
        C_PAD=_padded(value),
        HAS_PENALTIES=tally is not None,
        TALLY_BY_ROW=tally_by_row,
        L=_LANES,
        W=16 // logits_RV.element_size(),  # what a thread loads at once
        D=_PLACES,
        num_warps=_FLOOR_WARPS,
        maxnreg=1024 // _FLOOR_WARPS,  # two programs a multiprocessor
    )
    return floors
