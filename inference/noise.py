"""Noise: random numbers that depend on (draw seed, position, token) and on nothing else.

Counter-based: no generator state, so batch order, batch size, retries and device cannot change a draw.
All integer arithmetic is unsigned 32 bit and wraps; `^` is xor, `>>` shifts in zeros. A kernel that follows
these lines gets the same bits:

    mix(x):  x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15;  x *= 0x735A2D97;  x ^= x >> 15
    noise_key(seed, position):            seed is 64 bit: low and high half
        a     = mix(low  + 0x9E3779B9)
        b     = mix(high + a)
        key_0 = mix(position + b)
        key_1 = mix(key_0 ^ (a + 0x85EBCA6B))
    noise_bits(key, token_id) = mix(mix(token_id ^ key_0) + key_1)
    uniform(bits)             = min(float32(bits) * 2**-32 + 2**-33, 1 - 2**-24)      in (0, 1)
    gumbel(bits)              = -log(-log1p(-uniform(bits)))                          all in float32

The float steps up to `uniform` are exact or correctly rounded, the same with or without fused multiply-add.
`log` and `log1p` may differ in the last place between devices, so two devices may choose differently where two
tokens' scores agree to about 1e-6. Small uniforms are fine-grained and make large Gumbel values: where draws
are won, ties are rare.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFF_FFFF
GOLDEN = 0x9E37_79B9
SECOND = 0x85EB_CA6B
MULTIPLIER_0 = 0x21F0_AAAD
MULTIPLIER_1 = 0x735A_2D97
_LARGEST_UNIFORM = 1.0 - 2.0**-24


def mix(x: int) -> int:
    """Return a 32-bit integer that depends on every bit of a 32-bit `x`; one to one."""
    x = ((x ^ (x >> 16)) * MULTIPLIER_0) & MASK
    x = ((x ^ (x >> 15)) * MULTIPLIER_1) & MASK
    return x ^ (x >> 15)


def noise_key(draw_seed: int, position: int) -> tuple[int, int]:
    """Return the two 32-bit keys of one position (0 is the first completion token) of one sequence."""
    low, high = draw_seed & MASK, (draw_seed >> 32) & MASK
    a = mix((low + GOLDEN) & MASK)
    b = mix((high + a) & MASK)
    key_0 = mix((position + b) & MASK)
    return key_0, mix(key_0 ^ ((a + SECOND) & MASK))


def noise_bits(
    keys: Sequence[tuple[int, int]], num_tokens: int, device: torch.device, *, start: int = 0
) -> Tensor:
    """Return the 32 random bits of tokens `start` and on of every row, [rows, num_tokens], as int64."""
    keys_R2 = torch.tensor(keys, dtype=torch.int64, device=device).reshape(len(keys), 2)
    token_ids_V = torch.arange(start, start + num_tokens, dtype=torch.int64, device=device)
    bits_RV = _mix_tensor(token_ids_V[None, :] ^ keys_R2[:, :1])
    return _mix_tensor((bits_RV + keys_R2[:, 1:]) & MASK)


def uniform(bits: Tensor) -> Tensor:
    """Return float32 numbers in (0, 1), for 32-bit `bits` held in int64."""
    values = bits.to(torch.float32) * 2.0**-32 + 2.0**-33
    return values.clamp(max=_LARGEST_UNIFORM)


def gumbel(bits: Tensor) -> Tensor:
    """Return standard Gumbel noise in float32: adding it to logits makes argmax a draw from softmax."""
    return -torch.log(-torch.log1p(-uniform(bits)))


def _mix_tensor(x: Tensor) -> Tensor:
    # int64 products wrap modulo 2**64, so their low 32 bits are those of the 32-bit product.
    x = ((x ^ (x >> 16)) * MULTIPLIER_0) & MASK
    x = ((x ^ (x >> 15)) * MULTIPLIER_1) & MASK
    return x ^ (x >> 15)
