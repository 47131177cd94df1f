"""The device sampler over a partitioned vocabulary: `python -m tests.rank_sampler`, under a launcher.

Every rank compares with the reference sampler on whole rows; in Triton's interpreter unless there are devices.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

import torch.distributed as dist

from inference.kernels import device_sampler
from inference.sampler import SamplerRow, sample
from inference.sampling import SamplingParams
from inference.slot_params import STOPPED, SlotParams
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


def compare(ranks: TensorParallel, samplings: list[SamplingParams], dtype: torch.dtype) -> None:
    device = current_device()
    generator = torch.Generator().manual_seed(len(samplings))
    logits = (torch.randn(NUM_ROWS, VOCAB, generator=generator) * 3).to(dtype)
    logits[-1, 4] = torch.nan
    rows = [
        SamplerRow(samplings[i % len(samplings)], 2**63 + 12345 * i, [1], [0] * i, {7, 9})
        for i in range(NUM_ROWS)
    ]
    params = SlotParams(NUM_ROWS, device)
    for slot, row in enumerate(rows):
        params.write(slot, row)
    result = torch.full((NUM_ROWS,), -5, dtype=torch.int32, device=device)
    here = slice(*columns_of(VOCAB, ranks.rank, ranks.size))
    device_sampler.sample(
        logits[:, here].contiguous().to(device),
        torch.arange(NUM_ROWS, dtype=torch.int32, device=device),
        torch.arange(NUM_ROWS, dtype=torch.int32, device=device),
        torch.tensor([0, 0, NUM_ROWS, 0, 0, 0, 0, 0], dtype=torch.int32, device=device),
        params.on_device,
        torch.zeros(NUM_ROWS, dtype=torch.int32, device=device),
        result,
        has_draws=params.has_draws,
        has_floors=params.has_floors,
        vocabulary=PartitionedVocabulary(VOCAB, ranks),
        ranks=ranks,
    )
    found = [token & (STOPPED - 1) if token >= 0 else token for token in result.tolist()]
    expected = sample(logits, rows).token_ids
    assert found == expected, f"{found} instead of {expected}"


if __name__ == "__main__":
    join_world(Place.from_environment(), timeout_s=120)
    for samplings in (SAMPLINGS[:1], SAMPLINGS[:2], SAMPLINGS):
        for dtype in (torch.float32, torch.bfloat16):
            compare(TensorParallel.of(dist.group.WORLD), samplings, dtype)
    leave_world()
