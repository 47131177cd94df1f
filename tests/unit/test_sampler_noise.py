"""The counter-based noise: exact bits, and no pattern anybody could see."""

import math

import pytest
import torch

from inference.noise import MASK, gumbel, mix, noise_bits, noise_key, uniform

CPU = torch.device("cpu")
PINNED = [2355425645, 973003063, 3345453106]


def bits_by_the_book(seed: int, position: int, token_id: int) -> int:
    """The module docstring, written once more with plain integers."""

    def scramble(x: int) -> int:
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0x735A2D97 % 2**32
        return x ^ (x >> 15)

    low, high = seed % 2**32, seed >> 32
    a = scramble((low + 0x9E3779B9) % 2**32)
    b = scramble((high + a) % 2**32)
    key_0 = scramble((position + b) % 2**32)
    key_1 = scramble(key_0 ^ ((a + 0x85EBCA6B) % 2**32))
    return scramble((scramble(token_id ^ key_0) + key_1) % 2**32)


def chi_square(counts: torch.Tensor) -> float:
    """How many standard deviations the counts' chi-square lies from that of a fair die."""
    expected = counts.sum() / len(counts)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - (len(counts) - 1)) / math.sqrt(2 * (len(counts) - 1))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF])
def test_tensor_bits_are_those_of_the_definition(seed):
    positions = (0, 1, 77, 2**31)
    bits = noise_bits([noise_key(seed, position) for position in positions], 300, CPU)
    for row, position in enumerate(positions):
        expected = [bits_by_the_book(seed, position, token_id) for token_id in range(300)]
        assert bits[row].tolist() == expected


def test_the_bits_never_change():
    assert [bits_by_the_book(1234, 5, t) for t in (0, 1, 151_935)] == PINNED


def test_mix_is_one_to_one_where_tried():
    assert len({mix(x) for x in range(1 << 16)}) == 1 << 16


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bits_are_uniform_over_tokens_positions_and_seeds(shift):
    over_tokens = noise_bits([noise_key(7, 3)], 1 << 16, CPU).flatten()
    over_positions = noise_bits([noise_key(7, i) for i in range(1 << 14)], 4, CPU).flatten()
    over_seeds = noise_bits([noise_key(i, 0) for i in range(1 << 14)], 4, CPU).flatten()
    over_high_seeds = noise_bits([noise_key(i << 32, 0) for i in range(1 << 14)], 4, CPU).flatten()
    for bits in (over_tokens, over_positions, over_seeds, over_high_seeds):
        assert abs(chi_square(torch.bincount((bits >> shift) & 0xFF, minlength=256).float())) < 4


@pytest.mark.parametrize("step", ["token", "position", "seed", "high seed"])
def test_neighbours_share_nothing(step):
    """Changing one input by one flips each of the 32 bits half the time."""
    num = 4096
    base = noise_bits([noise_key(i, 9) for i in range(num)], 2, CPU)
    other = {
        "token": base[:, 1],
        "position": noise_bits([noise_key(i, 10) for i in range(num)], 1, CPU)[:, 0],
        "seed": noise_bits([noise_key(i + num, 9) for i in range(num)], 1, CPU)[:, 0],
        "high seed": noise_bits([noise_key(i | 1 << 32, 9) for i in range(num)], 1, CPU)[:, 0],
    }[step]
    flipped = base[:, 0] ^ other
    rates = torch.stack([((flipped >> bit) & 1).float().mean() for bit in range(32)])
    assert (rates - 0.5).abs().max() < 5 * 0.5 / math.sqrt(num)


def test_rows_are_not_correlated():
    noise = gumbel(noise_bits([noise_key(11, i) for i in range(64)], 4096, CPU))
    correlation = torch.corrcoef(noise) - torch.eye(64)
    assert correlation.abs().max() < 5.5 / math.sqrt(4096)


def test_uniform_and_gumbel_stay_finite_at_the_ends():
    ends = torch.tensor([0, 1, MASK // 2, MASK - 1, MASK])
    values = uniform(ends)
    assert values[0] == 2.0**-33
    assert ((values > 0) & (values < 1)).all()
    assert values.tolist() == sorted(values.tolist())
    assert torch.isfinite(gumbel(ends)).all()


def test_gumbel_has_the_mean_and_spread_of_its_name():
    noise = gumbel(noise_bits([noise_key(3, i) for i in range(64)], 8192, CPU)).double()
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
