"""Triton kernels against plain torch in fp64, with poisoned outputs: on the GPU, else in Triton's interpreter."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: kernels are not tested here")

from inference.batch import (
    TILE_QUARTERS,
    BatchLimits,
    buffer_size,
    cut,
    make_batch,
    views_of,
)
from inference.kernels import device_sampler, fused, fused_attention, plain
from inference.model import make_paged_model
from inference.planner import Planner, Slots
from inference.sampler import SamplerRow, sample
from inference.sampling import SamplingParams
from inference.sequence import Sequence
from inference.slot_params import STOPPED, SlotParams
from inference.steps import Chunk, Running, Step
from tests.paged_cases import (
    model_of,
    prompts_of,
    reference,
    run,
    sequences_of,
    settings_of,
    tokens,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOLERANCE = 1e-2 if DEVICE.type == "cuda" else 1e-5


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan"))


class Case:
    """A random batch: decoding rows of given lengths and prefixes, prefill chunks, poisoned unused memory."""

    def __init__(
        self,
        lens: list[int],
        chunks: list[tuple[int, int]] = (),
        *,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 16,
        block_size: int = 16,
        num_shared: int = 0,
        shared_blocks: int = 0,
        num_programs: int = 4,
    ) -> None:
        num_heads, num_kv_heads = heads
        group = num_heads // num_kv_heads
        rows = len(lens) + len(chunks)
        totals = [*lens, *(start + count for start, count in chunks)]
        per_seq = -(-max(totals) // block_size)
        num_tokens = len(lens) + sum(count for _, count in chunks)
        self.limits = BatchLimits(
            max_num_tokens=num_tokens + 3,
            max_num_seqs=rows,
            block_size=block_size,
            max_blocks_per_seq=per_seq,
            tile_queries=fused_attention.tile_rows(group) // group,
            num_programs=num_programs,
            max_num_items=256,
        )
        num_blocks = 1 + rows * per_seq
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(1)) + 1
        table_host = order.view(rows, per_seq).to(torch.int32)
        if num_shared:
            table_host[:num_shared, :shared_blocks] = table_host[0, :shared_blocks]
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        self.k_cache, self.v_cache = random(*shape, seed=2), random(*shape, seed=3)
        slots = Slots(self.limits, table_host.numpy())
        runnings = []
        for slot in range(rows):
            running = Running(Sequence(slot, [1]), [1] * totals[slot], 1)
            running.slot, running.block_table = slot, table_host[slot].tolist()
            runnings.append(running)
        for slot, length in enumerate(lens):
            slots.context_len[slot] = length - 1
            if slot < num_shared:
                slots.shared_len[slot] = shared_blocks * block_size
                slots.shared_block[slot] = table_host[slot, shared_blocks - 1]
        self._poison_past_ends(table_host, totals)
        parts: dict[str, Any] = views_of(np.zeros(buffer_size(self.limits), np.int32), self.limits)
        step = Step(
            1,
            runnings[: len(lens)],
            True,
            [
                Chunk(runnings[len(lens) + i], start, count, True)
                for i, (start, count) in enumerate(chunks)
            ],
            [],
            [],
            [],
            runnings,
        )
        planner = Planner(self.limits, slots)
        plan = planner.fill(step, parts)
        planner.pad(parts, plan, num_tokens + 3, rows)
        self.num_pieces = int((parts["tiles"][: plan.num_tiles, 6] >= 0).sum())
        assert plan.is_mixed == bool(chunks or self.num_pieces)
        packed = torch.from_numpy(np.concatenate([p.ravel() for p in parts.values()]))
        views = views_of(packed.to(DEVICE), self.limits)
        scratch = fused_attention.make_scratch(
            self.limits, num_heads, num_kv_heads, head_dim, DTYPE, DEVICE
        )
        poisoned(scratch.part_out), poisoned(scratch.part_lse)
        whole = make_batch(views, table_host.to(DEVICE), scratch)
        self.batch = cut(whole, plan, num_tokens + 3)
        self.num_tokens = num_tokens
        self.q = random(num_tokens + 3, num_heads, head_dim, seed=4)

    def _poison_past_ends(self, table: torch.Tensor, totals: list[int]) -> None:
        size = self.limits.block_size
        for slot, total in enumerate(totals):
            for position in range(total, table.shape[1] * size):
                block, offset = int(table[slot, position // size]), position % size
                self.k_cache[block, :, offset] = float("nan")
                self.v_cache[block, :, offset] = float("nan")

    def store_in_fp8(self) -> None:
        self.k_cache = self.k_cache.nan_to_num(0.0).to(torch.float8_e4m3fn)
        self.v_cache = self.v_cache.nan_to_num(0.0).to(torch.float8_e4m3fn)

    def check(self, window: int = 0, tolerance: float = TOLERANCE) -> None:
        found = fused.attention(
            self.q, self.k_cache, self.v_cache, self.batch, scale=0.3, window=window
        )
        expected = plain.attention(
            self.q.double(),
            self.k_cache.double(),
            self.v_cache.double(),
            self.batch,
            scale=0.3,
            window=window,
        )
        assert error_of(found[: self.num_tokens], expected[: self.num_tokens]) < tolerance
        scratch = self.batch.scratch
        assert not scratch.tickets.any(), "a ticket counter was left behind"
        assert not scratch.arrivals.any(), "a count of parts was left behind"


def test_decode_attention_equals_plain():
    Case([1, 5, 16, 17, 40, 63]).check()


def test_decode_attention_cut_into_parts_equals_plain():
    Case([700, 1, 530, 300], num_programs=1).check()


@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (6, 2)])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_decode_attention_takes_any_group_and_width(heads, head_dim):
    Case([3, 33, 280], heads=heads, head_dim=head_dim).check()


def test_decode_attention_honours_a_window():
    Case([3, 33, 290, 600]).check(window=20)


@pytest.mark.parametrize("heads", [(4, 2), (6, 2)])
def test_prefill_attention_equals_plain(heads):
    Case([], [(0, 1), (0, 40), (37, 9), (16, 100)], heads=heads).check()


def test_a_group_wider_than_a_tile_makes_the_tile_wider():
    Case([20, 70], [(0, 3), (37, 4)], heads=(71, 1)).check()


def test_prefill_attention_honours_a_window():
    Case([], [(0, 70), (37, 9), (90, 30)]).check(window=20)


def test_mixed_steps_equal_plain():
    Case([9, 64, 300], [(0, 33), (50, 7)]).check()


def test_a_prefix_shared_by_many_rows_is_read_once_and_gives_the_same():
    case = Case([70, 90, 65, 300, 120, 80, 10], num_shared=6, shared_blocks=4)
    assert case.num_pieces
    case.check()


@pytest.mark.parametrize(
    ("case", "quarters"),
    [
        (([], [(0, 100)]), 4),
        (([9], [(0, 100)]), 4),
        (([90], [(0, 100)]), 3),
        (([900] * 3, [(0, 100)]), 2),
    ],
)
def test_tiles_take_fewer_programs_the_more_keys_are_read_beside_them(case, quarters):
    batch = Case(*case)
    assert int(batch.batch.counts[TILE_QUARTERS]) == quarters
    batch.check()


class _Deferred:
    """A kernel whose launch waits for that of another, which on a device may end before it."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._launch: Any = None

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: setattr(
            self, "_launch", lambda: self._kernel[grid](*args, **options)
        )

    def behind(self, kernel: Any) -> Any:
        """Return the other kernel, which is followed by what waits."""
        first, second = kernel, self

        class _Both:
            def __getitem__(self, grid: Any) -> Any:
                def launch(*args: Any, **options: Any) -> None:
                    first[grid](*args, **options)
                    second._launch()

                return launch

        return _Both()


@pytest.mark.parametrize("heads", [(4, 2), (8, 1)])
def test_parts_are_merged_by_whoever_ends_last(monkeypatch, heads):
    late = _Deferred(fused_attention.tile_kernel)
    monkeypatch.setattr(fused_attention, "tile_kernel", late)
    monkeypatch.setattr(
        fused_attention, "decode_kernel", late.behind(fused_attention.decode_kernel)
    )
    lens = [600 + 90 * i for i in range(6)]
    case = Case(lens, [(0, 20)], heads=heads, num_shared=5, shared_blocks=36, num_programs=8)
    assert case.num_pieces > 1
    case.check()


def test_a_long_shared_prefix_is_read_in_pieces():
    lens = [600 + 7 * i for i in range(6)]
    case = Case(lens, [(0, 20)], num_shared=6, shared_blocks=36, num_programs=8)
    assert case.num_pieces > 1
    case.check()


@pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
def test_fp8_keys_and_values_are_read_as_they_are_stored(head_dim):
    case = Case([70, 130, 64], [(0, 33), (64, 70)], head_dim=head_dim, block_size=64)
    case.store_in_fp8()
    case.check(tolerance=max(TOLERANCE, 1e-3))  # products in fp16


@pytest.mark.parametrize("window", [0, 20])
def test_fp8_values_in_pairs_keep_their_places_in_a_head(window):
    case = Case([20, 37, 16], heads=(2, 1), head_dim=fused_attention.PAIRED_HEAD_DIM)
    case.store_in_fp8()
    case.check(window, tolerance=max(TOLERANCE, 1e-3))


def test_heads_of_256_in_blocks_of_64_are_attended_to():
    Case([70, 300], [(0, 33)], head_dim=256, block_size=64).check()


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("width", [24, 64, 1000])
def test_add_rms_norm_equals_plain(width, has_residual):
    x, residual, weight = random(5, width), random(5, width, seed=1), random(width, seed=2)
    expected_residual = residual.double()
    expected = plain.add_rms_norm(
        x.double(), expected_residual if has_residual else None, weight.double(), 1e-5
    )
    found = fused.add_rms_norm(x, residual if has_residual else None, weight, 1e-5)
    assert error_of(found, expected) < TOLERANCE
    assert error_of(residual, expected_residual) < TOLERANCE


@pytest.mark.parametrize("width", [48, 3000])
def test_silu_mul_equals_plain(width):
    gate_up = random(3, 2 * width)
    assert error_of(fused.silu_mul(gate_up), plain.silu_mul(gate_up.double())) < TOLERANCE


def share_alike(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found == expected).double().mean())


# Triton's interpreter cuts bf16 off where a device rounds it.
HALVES = [torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")


@pytest.mark.parametrize("dtype", HALVES)
def test_element_wise_kernels_round_where_the_reference_does(dtype):
    x, residual = random(64, 512).to(dtype), random(64, 512, seed=1).to(dtype)
    weight = (1 + random(512, seed=2) / 4).to(dtype)
    mine, its = residual.clone(), residual.clone()
    found = fused.add_rms_norm(x, mine, weight, 1e-5)
    expected = plain.add_rms_norm(x, its, weight, 1e-5)
    assert torch.equal(mine, its)
    assert share_alike(found, expected) > 0.999  # sums in another order may turn a rounding
    assert share_alike(fused.silu_mul(x), plain.silu_mul(x)) > 0.999


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("has_norm", [True, False])
def test_rotated_heads_are_rounded_where_the_reference_rounds(has_norm, dtype):
    case = Case([9, 64, 30], [(0, 33)], heads=(4, 2), head_dim=64)
    qkv = random(case.batch.num_tokens, (4 + 2 * 2) * 64, seed=5).to(dtype)
    angles = torch.outer(torch.arange(64.0), torch.arange(1.0, 33) / 9).to(DEVICE)
    weight = (1 + random(64, seed=6) / 4).to(dtype) if has_norm else None
    caches = [torch.zeros_like(case.k_cache, dtype=dtype) for _ in range(4)]
    settings = (weight, weight, 1e-5, angles.cos(), angles.sin(), case.batch)
    found = fused.rope_store(qkv, *settings, *caches[:2])
    expected = plain.rope_store(qkv, *settings, *caches[2:])
    assert share_alike(found, expected) > 0.999
    assert share_alike(caches[0][1:], caches[2][1:]) > 0.999  # block 0 is trash
    assert torch.equal(caches[1][1:], caches[3][1:])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="e4m3 needs the device")
def test_rows_in_fp8_keep_three_bits():
    x, weight = random(5, 1000), random(1000, seed=2)
    rows, scale = fused.add_rms_norm(x, None, weight, 1e-5, is_fp8=True)
    expected = plain.add_rms_norm(x.double(), None, weight.double(), 1e-5)
    assert error_of(rows.double() * scale, expected) < 0.04
    rows, scale = fused.silu_mul(x, is_fp8=True)
    assert error_of(rows.double() * scale, plain.silu_mul(x.double())) < 0.04
    rows, scale = fused.quantise_rows(x)
    assert error_of(rows.double() * scale, x) < 0.04


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 16), ((6, 3), 24)])
def test_rope_store_equals_plain(heads, head_dim, has_norm):
    case = Case([9, 64, 30], [(0, 33)], heads=heads, head_dim=head_dim)
    num_heads, num_kv_heads = heads
    qkv = random(case.batch.num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, seed=5)
    angles = torch.outer(torch.arange(64.0), torch.arange(1.0, head_dim // 2 + 1) / 9)
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    weights = (random(head_dim, seed=6), random(head_dim, seed=7)) if has_norm else (None, None)
    wide = [None if w is None else w.double() for w in weights]
    k, v = poisoned(case.k_cache.clone()), poisoned(case.v_cache.clone())
    k_wide, v_wide = k.double(), v.double()
    found = fused.rope_store(qkv, *weights, 1e-5, cos, sin, case.batch, k, v)
    expected = plain.rope_store(
        qkv.double(), *wide, 1e-5, cos.double(), sin.double(), case.batch, k_wide, v_wide
    )
    assert error_of(found, expected) < TOLERANCE
    k[0] = v[0] = k_wide[0] = v_wide[0] = 0  # the trash block: padding tokens race there
    assert torch.equal(k.isnan(), k_wide.isnan())
    assert error_of(k.nan_to_num(0.0), k_wide.nan_to_num(0.0)) < TOLERANCE
    assert error_of(v.nan_to_num(0.0), v_wide.nan_to_num(0.0)) < TOLERANCE


SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3, top_k=7),
    SamplingParams(temperature=1.5, top_p=0.6),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=2.0, top_k=40, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=0.9, top_k=1),
    SamplingParams(temperature=1e-8, top_p=1e-6),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("samplings", [SAMPLINGS[:1], SAMPLINGS[:2], SAMPLINGS])
def test_tokens_are_those_of_the_reference_sampler(samplings, dtype):
    vocab = 5003
    rows = [
        SamplerRow(samplings[i % len(samplings)], 2**63 + 12345 * i, [1], [0] * i, {7, 9})
        for i in range(17)
    ]
    logits = (random(len(rows), vocab).float() * 3).to(dtype)
    expected = sample(logits, rows).token_ids
    found = _sample_fused(logits, rows)
    assert found == expected


def test_the_two_zeros_tie():
    """The second best is a zero; those of the other sign stay too, as in the reference."""
    rows = [SamplerRow(SamplingParams(temperature=50.0, top_k=2), i, [1]) for i in range(12)]
    logits = torch.zeros(len(rows), 40, device=DEVICE)
    logits[:, 20:], logits[:, 30] = -0.0, 1.0
    expected = sample(logits, rows).token_ids
    assert min(expected) < 20 <= max(expected)
    assert _sample_fused(logits, rows) == expected


def test_end_tokens_are_marked_and_broken_rows_are_no_token():
    logits = torch.zeros(4, 300, device=DEVICE)
    logits[0, 7], logits[1, 8], logits[2, 5], logits[3, 5] = 1.0, 1.0, float("nan"), float("inf")
    rows = [SamplerRow(SamplingParams(stop_token_ids=(9,)), 1, [1], [], {7}) for _ in range(4)]
    assert _sample_fused(logits, rows, keep_marks=True) == [7 | STOPPED, 8, -1, -1]


def _sample_fused(logits: torch.Tensor, rows: list[SamplerRow], keep_marks: bool = False) -> Any:
    count = len(rows)
    params = SlotParams(count + 2, DEVICE)
    slots = [(3 * i) % count if count % 3 else i for i in range(count)]
    for slot, row in zip(slots, rows, strict=True):
        params.write(slot, row)
    last_token = torch.full((count + 2,), -5, dtype=torch.int32, device=DEVICE)
    result = torch.full((count,), -5, dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([0, 0, count, 0, 0, 0, 0, 0], dtype=torch.int32, device=DEVICE)
    device_sampler.sample(
        logits,
        torch.tensor(slots, dtype=torch.int32, device=DEVICE),
        torch.tensor([len(row.token_ids) for row in rows], dtype=torch.int32, device=DEVICE),
        counts,
        params.on_device,
        last_token,
        result,
        has_draws=params.has_draws,
        has_floors=params.has_floors,
    )
    found = result.tolist()
    for slot, token in zip(slots, found, strict=True):
        assert last_token[slot] == (token & (STOPPED - 1) if token >= 0 else 0)
    return found if keep_marks else [token & (STOPPED - 1) for token in found]


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe", "mistral-window", "gpt-neox"])
def test_an_engine_on_the_kernels_gives_the_plain_models_tokens(family):
    sequences = sequences_of(prompts_of(7, shared=18), max_tokens=6)
    expected = reference(model_of(family).to(DEVICE), sequences)
    model = make_paged_model(model_of(family).to(DEVICE), fused)
    completions, engine = run(model, sequences, settings_of(block_size=16, max_num_blocks=60))
    assert tokens(completions) == expected
    assert engine.stats.num_cached_tokens > 0
