"""The device sampler over a partitioned vocabulary: `python -m tests.rank_sampler`, under a launcher.

Every rank compares with the reference sampler on whole rows; in Triton's interpreter unless there are devices.
"""

import os

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

import torch.distributed as dist

from inference.in_flight import InFlight
from inference.kernels import device_sampler
from inference.sampler import SamplerRow, sample
from inference.sampling import MAX_LOGPROBS, SamplingParams
from inference.sequence import TokenLogprob
from inference.slot_params import STOPPED, SlotParams
from inference.tally import TokenTally
from inference.tensor_parallel import TensorParallel
from inference.vocabulary import PartitionedVocabulary, columns_of
from inference.world import Place, current_device, join_world, leave_world

VOCAB, NUM_ROWS = 5003, 13
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3, top_k=7),
    SamplingParams(temperature=1.5, top_p=0.6),
    SamplingParams(temperature=2.0, top_k=40, top_p=0.9, min_p=0.01),
]
WITH_A_PAST = [
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5),
    SamplingParams(temperature=1.0, frequency_penalty=0.4, min_tokens=20, logprobs=4),
    *SAMPLINGS[:3],
]


def compare(
    ranks: TensorParallel, samplings: list[SamplingParams], dtype: torch.dtype, num_steps: int
) -> None:
    """In several steps what was chosen is part of what the next step depends on."""
    device = current_device()
    vocabulary = PartitionedVocabulary(VOCAB, ranks)
    rows = [
        SamplerRow(
            samplings[i % len(samplings)], 2**63 + 12345 * i, [1, 4000], [0, 5] * (i // 2), {7, 9}
        )
        for i in range(NUM_ROWS)
    ]
    tally = TokenTally(NUM_ROWS, vocabulary, device)
    params = SlotParams(NUM_ROWS, device, tally)
    for slot, row in enumerate(rows):
        params.write(slot, row)
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(len(samplings) + step)
        logits = torch.randn(NUM_ROWS, VOCAB, generator=generator) * 3
        logits[:, [1, 5, 7, 2000, 4000]] += 9  # on every rank a favourite
        logits[-1, 4] = torch.nan
        found, flight = chosen(logits.to(dtype), rows, params, tally, vocabulary, ranks)
        expected, logprobs = sample(logits.to(dtype), rows)
        assert found == expected, f"{found} instead of {expected}"
        check_logprobs(flight, logprobs)
        for row, token in zip(rows, expected, strict=True):
            row.token_ids = [*row.token_ids, max(0, token)]


def chosen(
    logits: torch.Tensor,
    rows: list[SamplerRow],
    params: SlotParams,
    tally: TokenTally,
    vocabulary: PartitionedVocabulary,
    ranks: TensorParallel,
) -> tuple[list[int], InFlight]:
    """Return the device sampler's tokens, -1 for none, and the step as the engine gets it."""
    device = current_device()
    logprobs = torch.zeros(NUM_ROWS, 1 + 2 * MAX_LOGPROBS, dtype=torch.int32, device=device)
    result = torch.full((NUM_ROWS,), -5, dtype=torch.int32, device=device)
    here = slice(*columns_of(VOCAB, ranks.rank, ranks.size))
    device_sampler.sample(
        logits[:, here].contiguous().to(device),
        torch.arange(NUM_ROWS, dtype=torch.int32, device=device),
        torch.tensor([len(row.token_ids) for row in rows], dtype=torch.int32, device=device),
        torch.tensor([0, 0, NUM_ROWS, 0, 0, 0, 0, 0], dtype=torch.int32, device=device),
        params.on_device,
        torch.zeros(NUM_ROWS, dtype=torch.int32, device=device),
        result,
        has_draws=params.has_draws,
        has_floors=params.has_floors,
        has_bans=params.has_bans,
        tally=tally.table if params.has_penalties else None,
        logprobs=logprobs if params.has_logprobs else None,
        vocabulary=vocabulary,
        ranks=ranks,
    )
    tokens = [token & (STOPPED - 1) if token >= 0 else token for token in result.tolist()]
    return tokens, InFlight(None, np.arange(NUM_ROWS), None, None, None, logprobs.cpu())


def check_logprobs(flight: InFlight, expected: list[TokenLogprob | None]) -> None:
    for index, entry in enumerate(expected):
        if entry is None:
            continue
        found = flight.logprob(index, entry.token_id, len(entry.top))
        assert [token for token, _ in found.top] == [token for token, _ in entry.top]
        for mine, theirs in zip(
            (*found.top, (0, found.logprob)), (*entry.top, (0, entry.logprob)), strict=True
        ):
            assert abs(mine[1] - theirs[1]) < 2e-5, f"{mine[1]} instead of {theirs[1]}"


if __name__ == "__main__":
    join_world(Place.from_environment(), timeout_s=120)
    ranks = TensorParallel.of(dist.group.WORLD)
    for dtype in (torch.float32, torch.bfloat16):
        for samplings in (SAMPLINGS[:1], SAMPLINGS[:2], SAMPLINGS):
            compare(ranks, samplings, dtype, num_steps=1)
        compare(ranks, WITH_A_PAST, dtype, num_steps=3)
    leave_world()
