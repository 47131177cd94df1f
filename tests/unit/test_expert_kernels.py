"""Experts on Triton kernels and in e4m3 against the model's own module: on the GPU, else in Triton's interpreter."""

import pytest
import torch
import transformers

from inference.experts import Experts, quantised_experts
from inference.kernels import plain
from inference.kernels.plain import ExpertWeights
from inference.tensor_parallel import TensorParallel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOLERANCE = 2e-2 if DEVICE.type == "cuda" else 1e-5


def block_of(num_experts: int, top_k: int, width: int, hidden: int, *, is_normed: bool = True):
    """A transformers block with random weights."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    torch.manual_seed(num_experts)
    config = transformers.Qwen3MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        hidden_size=hidden,
        norm_topk_prob=is_normed,
    )
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.requires_grad_(False).double()


def rows_of(num_tokens: int, hidden: int) -> torch.Tensor:
    return torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(1))


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("num_experts", "top_k", "width", "hidden", "num_tokens", "is_normed"),
    [
        (4, 2, 16, 32, 1, True),
        (5, 3, 20, 24, 37, False),
        (8, 8, 16, 48, 9, True),
        (3, 1, 40, 32, 130, True),
    ],
)
def test_kernels_equal_the_models_own_module(
    num_experts, top_k, width, hidden, num_tokens, is_normed
):
    pytest.importorskip("triton", reason="Triton is not installed: kernels are not tested here")
    from inference.kernels import fused

    block = block_of(num_experts, top_k, width, hidden, is_normed=is_normed)
    x = rows_of(num_tokens, hidden).to(DEVICE, DTYPE)
    expected = block.to(DEVICE)(x[None].double())[0]
    found = Experts(block.to(DTYPE), fused, False, TensorParallel.alone())(x)
    assert error_of(found, expected) < TOLERANCE


def test_the_plain_form_equals_the_models_own_module():
    block = block_of(6, 2, 16, 32)
    x = rows_of(21, 32).double()
    found = Experts(block, plain, False, TensorParallel.alone())(x)
    assert error_of(found, block(x[None])[0]) < 1e-6  # the model softmaxes in fp32


def test_every_tile_size_gives_the_same_sums(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: kernels are not tested here")
    from inference.kernels import fused, fused_experts

    block = block_of(4, 2, 48, 32).to(DEVICE)
    x = rows_of(50, 32).to(DEVICE, DTYPE)
    expected = block(x[None].double())[0]
    experts = Experts(block.to(DTYPE), fused, False, TensorParallel.alone())
    for rows_per_expert in (1, 20, 40, 1000):
        tiles = fused_experts.tiles_for(rows_per_expert)
        monkeypatch.setattr(fused_experts, "tiles_for", lambda _, tiles=tiles: tiles)
        assert error_of(experts(x), expected) < TOLERANCE
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("arch", "kib", "num_held"),
    [(75, 64, -1), (80, 163, -1), (89, 99, -1), (90, 227, 0), (120, 99, 0), ("gfx942", 64, 0)],
)
def test_buffers_fit_the_shared_memory_of_every_card(arch, kib, num_held):
    pytest.importorskip("triton", reason="Triton is not installed: kernels are not tested here")
    from inference.kernels.fused_experts import most_stages

    for stage_bytes in (10 << 10, 24 << 10, 48 << 10):
        stages = most_stages(stage_bytes, arch)
        assert stages >= 1
        assert (stages + num_held) * stage_bytes <= kib << 10
        assert (stages + num_held + 1) * stage_bytes > kib << 10


def test_e4m3_keeps_three_bits_of_every_expert():
    weight = torch.randn(3, 8, 64)
    weight[1] *= 1000
    quantised = quantised_experts(weight)
    assert quantised.scale is not None
    assert error_of(quantised.weight.float() * quantised.scale[..., None], weight) < 0.04
    x = torch.randn(5, 64)
    for expert in range(3):
        expected = ExpertWeights(weight).product(x, expert)
        assert error_of(quantised.product(x, expert), expected) < 0.06


@pytest.mark.skipif(DEVICE.type != "cuda", reason="e4m3 needs the device")
def test_experts_in_e4m3_on_kernels_are_those_in_plain_torch():
    from inference.kernels import fused

    block = block_of(8, 2, 256, 512).to(DEVICE, DTYPE)
    for num_tokens in (3, 40, 300):
        x = rows_of(num_tokens, 512).to(DEVICE, DTYPE)
        expected = Experts(block, plain, True, TensorParallel.alone())(x)
        found = Experts(block, fused, True, TensorParallel.alone())(x)
        assert error_of(found, expected) < 0.02
