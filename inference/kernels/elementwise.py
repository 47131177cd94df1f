"""Fused element-wise kernels: residual add with RMSNorm, SiLU gate, and the path from QKV to the cache.

Each reads its input once and writes its output once. Sums are in fp32; in between values are rounded where
transformers' modules and `plain` round them, so that in 16 bits too all of them give the same. With IS_FP8 a row leaves as
e4m3 with one fp32 scale, ready for a row-wise scaled matmul.

    T tokens   D hidden size   I intermediate size (WIDTH)   N query heads   K KV heads   H head dim   S block size
"""

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """Round fp32 values to a dtype, and go on with them in fp32."""
    return value.to(DTYPE).to(tl.float32)


@triton.jit
def gated(gate, up, DTYPE: tl.constexpr):
    """Return silu(gate) * up, rounded in between."""
    return rounded(gate * tl.sigmoid(gate), DTYPE) * up


@triton.jit
def _store_row(out_ptr, scale_ptr, row, offs, value, mask, width, IS_FP8: tl.constexpr):
    """Store one row as it is, or scaled to e4m3 with its scale beside it."""
    place = out_ptr + row.to(tl.int64) * width + offs
    if IS_FP8:
        scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / FP8_MAX
        tl.store(scale_ptr + row, scale)
        value = tl.minimum(tl.maximum(value / scale, -FP8_MAX), FP8_MAX)
    tl.store(place, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """residual += x, in place; out = RMSNorm(residual) * weight. Without a residual, out = RMSNorm(x) * weight."""
    row = tl.program_id(0)
    offs = tl.arange(0, D_PAD)
    mask = offs < D
    place = row.to(tl.int64) * D + offs
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
        x = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + place, x, mask=mask)
        x = x.to(tl.float32)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    value = rounded(x * tl.rsqrt(tl.sum(x * x, 0) / D + eps), x_ptr.dtype.element_ty)
    value = rounded(value * weight, x_ptr.dtype.element_ty)
    _store_row(out_ptr, scale_ptr, row, offs, value, mask, D, IS_FP8)


@triton.jit
def silu_mul_kernel(
    gate_up_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gate_up [T,2I] -> out [T,I] = silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < WIDTH
    gate = tl.load(gate_up_ptr + row * 2 * WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * WIDTH + WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
    value = gated(gate, up, gate_up_ptr.dtype.element_ty)
    tl.store(out_ptr + row * WIDTH + offs, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_fp8_kernel(
    gate_up_ptr, out_ptr, scale_ptr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr
):
    """gate_up [T,2I] -> out [T,I] in e4m3, and its row scales."""
    row = tl.program_id(0)
    offs = tl.arange(0, WIDTH_PAD)
    mask = offs < WIDTH
    place = gate_up_ptr + row.to(tl.int64) * 2 * WIDTH + offs
    gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    value = rounded(gated(gate, up, gate_up_ptr.dtype.element_ty), gate_up_ptr.dtype.element_ty)
    _store_row(out_ptr, scale_ptr, row, offs, value, mask, WIDTH, True)


@triton.jit
def quantise_rows_kernel(x_ptr, out_ptr, scale_ptr, D: tl.constexpr, D_PAD: tl.constexpr):
    """x [T,D] -> out [T,D] in e4m3, and its row scales."""
    row = tl.program_id(0)
    offs = tl.arange(0, D_PAD)
    mask = offs < D
    value = tl.load(x_ptr + row.to(tl.int64) * D + offs, mask=mask, other=0.0).to(tl.float32)
    _store_row(out_ptr, scale_ptr, row, offs, value, mask, D, True)


@triton.jit
def _norm_rope(
    x1, x2, w1, w2, cos, sin, eps, H: tl.constexpr, HAS_NORM: tl.constexpr, DTYPE: tl.constexpr
):
    """Normalise heads given as two halves, then rotate them."""
    if HAS_NORM:
        inverse = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / H + eps)[:, None]
        x1 = rounded(rounded(x1 * inverse, DTYPE) * w1[None, :], DTYPE)
        x2 = rounded(rounded(x2 * inverse, DTYPE) * w2[None, :], DTYPE)
    y1 = rounded(x1 * cos[None, :], DTYPE) - rounded(x2 * sin[None, :], DTYPE)
    y2 = rounded(x2 * cos[None, :], DTYPE) + rounded(x1 * sin[None, :], DTYPE)
    return rounded(y1, DTYPE), rounded(y2, DTYPE)


@triton.jit
def rope_store_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    eps,
    N: tl.constexpr,
    N_PAD: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    H: tl.constexpr,
    HALF_PAD: tl.constexpr,
    S: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """qkv [T,(N+2K)H] -> q [T,N,H] normed and rotated; k likewise and v into the cache [blocks,K,S,H]."""
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = H // 2
    offs = tl.arange(0, HALF_PAD)
    in_half = offs < HALF
    position = tl.load(positions_ptr + token).to(tl.int64)
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    cos = tl.load(cos_ptr + position * HALF + offs, mask=in_half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + offs, mask=in_half, other=0.0).to(tl.float32)
    cos = rounded(cos, DTYPE)
    sin = rounded(sin, DTYPE)
    qw1 = cos
    qw2 = cos
    kw1 = cos
    kw2 = cos
    if HAS_NORM:
        qw1 = tl.load(q_weight_ptr + offs, mask=in_half, other=0.0).to(tl.float32)
        qw2 = tl.load(q_weight_ptr + HALF + offs, mask=in_half, other=0.0).to(tl.float32)
        kw1 = tl.load(k_weight_ptr + offs, mask=in_half, other=0.0).to(tl.float32)
        kw2 = tl.load(k_weight_ptr + HALF + offs, mask=in_half, other=0.0).to(tl.float32)
    row = qkv_ptr + token * ((N + 2 * K) * H)

    heads = tl.arange(0, N_PAD)
    mask = (heads[:, None] < N) & in_half[None, :]
    place = heads[:, None] * H + offs[None, :]
    x1 = tl.load(row + place, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(row + place + HALF, mask=mask, other=0.0).to(tl.float32)
    y1, y2 = _norm_rope(x1, x2, qw1, qw2, cos, sin, eps, H, HAS_NORM, DTYPE)
    q_row = q_ptr + token * (N * H)
    tl.store(q_row + place, y1.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(q_row + place + HALF, y2.to(q_ptr.dtype.element_ty), mask=mask)

    slot = tl.load(slots_ptr + token).to(tl.int64)
    kv_heads = tl.arange(0, K_PAD)
    kv_mask = (kv_heads[:, None] < K) & in_half[None, :]
    kv_place = kv_heads[:, None] * H + offs[None, :]
    cache = ((slot // S) * K + kv_heads[:, None]) * (S * H) + (slot % S) * H + offs[None, :]
    x1 = tl.load(row + N * H + kv_place, mask=kv_mask, other=0.0).to(tl.float32)
    x2 = tl.load(row + N * H + kv_place + HALF, mask=kv_mask, other=0.0).to(tl.float32)
    y1, y2 = _norm_rope(x1, x2, kw1, kw2, cos, sin, eps, H, HAS_NORM, DTYPE)
    tl.store(k_cache_ptr + cache, y1.to(k_cache_ptr.dtype.element_ty), mask=kv_mask)
    tl.store(k_cache_ptr + cache + HALF, y2.to(k_cache_ptr.dtype.element_ty), mask=kv_mask)
    v1 = tl.load(row + (N + K) * H + kv_place, mask=kv_mask, other=0.0)
    v2 = tl.load(row + (N + K) * H + kv_place + HALF, mask=kv_mask, other=0.0)
    tl.store(v_cache_ptr + cache, v1.to(v_cache_ptr.dtype.element_ty), mask=kv_mask)
    tl.store(v_cache_ptr + cache + HALF, v2.to(v_cache_ptr.dtype.element_ty), mask=kv_mask)
