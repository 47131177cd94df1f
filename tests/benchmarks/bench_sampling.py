"""Time of choosing one token a row from logits, by what the rows ask for: on the device, and by the reference.

    python tests/benchmarks/bench_sampling.py [--rows 64 256 1024] [--vocab 151936] [--repeats 20]

Each kind is timed with all rows of that kind, a prompt and a completion of 500 random tokens each. Logits have a head,
as a model's have: `NUM_LIKELY` random tokens with probabilities that fall as a power of their rank, between 1 and 4 by
row, over noise that together weighs a little. Of kinds named flat they are noise alone, with a deviation of 3: top-p
keeps thousands of tokens, and searches longer for the last. Beside the time: the time that reading the logits once
(two bytes each) takes at 3.35 TB/s, an H100's peak, to see how many such passes a kind costs. Where there is no device,
Triton's interpreter runs, whose times mean nothing: `--rows 2 --vocab 300`.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from inference.kernels import device_sampler
from inference.sampler import SamplerRow, sample
from inference.sampling import MAX_LOGPROBS, SamplingParams
from inference.slot_params import SlotParams
from inference.tally import TokenTally
from inference.vocabulary import WholeVocabulary

PEAK_BYTES_PER_S = 3.35e12
HISTORY = 500
NUM_LIKELY = 256
KINDS = {
    "greedy": SamplingParams(),
    "drawn": SamplingParams(temperature=1.0),
    "top-k and top-p": SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
    "presence, top-k and top-p": SamplingParams(
        temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5
    ),
    "top-p": SamplingParams(temperature=1.0, top_p=0.95),
    "flat, top-k and top-p": SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
    "flat, top-p": SamplingParams(temperature=1.0, top_p=0.95),
    "presence, greedy": SamplingParams(presence_penalty=1.5),
    "repetition, greedy": SamplingParams(repetition_penalty=1.1),
    "all penalties, drawn": SamplingParams(
        temperature=1.0, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.2
    ),
    "min_tokens": SamplingParams(min_tokens=512),
    "5 logprobs": SamplingParams(logprobs=5),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        started_at = time.perf_counter()
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started_at))
    return statistics.median(times)


def on_device(logits: torch.Tensor, rows: list[SamplerRow]) -> Callable[[], None]:
    """Start the rows in slots; return what samples all of them once, from the same state each time but for counts."""
    count, vocab = logits.shape
    tally = TokenTally(count, WholeVocabulary(vocab), DEVICE)
    params = SlotParams(count, DEVICE, tally)
    for slot, row in enumerate(rows):
        assert params.is_fast(slot, row), f"slot {slot}: the host would sample"
        params.write(slot, row)
    slots = torch.arange(count, dtype=torch.int32, device=DEVICE)
    positions = torch.full_like(slots, HISTORY)
    counts = torch.tensor([0, 0, count, 0, 0, 0, 0, 0], dtype=torch.int32, device=DEVICE)
    last_token, result = torch.zeros_like(slots), torch.zeros_like(slots)
    logprobs = torch.zeros(count, 1 + 2 * MAX_LOGPROBS, dtype=torch.int32, device=DEVICE)

    def run() -> None:
        device_sampler.sample(
            logits,
            slots,
            positions,
            counts,
            params.on_device,
            last_token,
            result,
            has_draws=params.has_draws,
            has_floors=params.has_floors,
            has_bans=params.has_bans,
            tally=tally.table if params.has_penalties else None,
            logprobs=logprobs if params.has_logprobs else None,
        )

    return run


def with_head(noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return logits [R,V] of rows with a few likely tokens each, from noise with a deviation of 1."""
    count, vocab = noise.shape
    num_likely = min(NUM_LIKELY, vocab)
    power = 1 + 3 * torch.rand(count, 1, generator=generator)
    head = 18 - power * torch.arange(1.0, num_likely + 1).log()
    tokens = torch.randint(0, vocab, head.shape, generator=generator)
    logits = 2 * noise
    return logits.scatter_(1, tokens, torch.maximum(head, logits.gather(1, tokens)))


def measure(count: int, vocab: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(count)
    noise = torch.randn(count, vocab, generator=generator)
    flat = (3 * noise).to(DEVICE, torch.bfloat16)
    headed = with_head(noise, generator).to(DEVICE, torch.bfloat16)
    history = torch.randint(0, min(vocab, 20_000), (count, 2 * HISTORY), generator=generator)
    pass_ms = 1000 * 2 * count * vocab / PEAK_BYTES_PER_S
    found: dict[str, Any] = {"rows": count, "pass_ms": pass_ms}
    print(f"{count} rows of {vocab} logits; one pass takes {pass_ms:.3f} ms at the peak")
    for name, sampling in KINDS.items():
        rows = [
            SamplerRow(sampling, i, ids[:HISTORY], ids[HISTORY:], {5, 9})
            for i, ids in enumerate(history.tolist())
        ]
        logits = flat if name.startswith("flat") else headed
        device_ms = median_ms(on_device(logits, rows), repeats)
        host_ms = median_ms(
            lambda rows=rows, logits=logits: sample(logits, rows), max(1, repeats // 10)
        )
        found[name] = {"device_ms": device_ms, "reference_ms": host_ms}
        print(f"  {name:28} {device_ms:9.3f} ms   reference {host_ms:9.1f} ms")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    sizes = [measure(count, options.vocab, options.repeats) for count in options.rows]
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "interpreter"
    print(
        json.dumps(
            {"benchmark": "sampling", "device": name, "vocab": options.vocab, "sizes": sizes}
        )
    )


if __name__ == "__main__":
    main()
