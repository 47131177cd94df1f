"""Experts: the routed feed-forward of one layer on the engine's operations, in full precision or in e4m3.

T tokens   D hidden size   E experts   I width of an expert, or this rank's part of it
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.kernels.plain import FP8_MAX, ExpertWeights
from inference.tensor_parallel import TensorParallel


class Experts:
    """Takes the weights of a transformers block of the Qwen3-MoE kind; what was cut over ranks is summed here."""

    def __init__(self, block: Any, ops: ModuleType, is_fp8: bool, ranks: TensorParallel) -> None:
        router, experts = block.gate, block.experts
        self._router: Tensor = router.weight
        self._top_k: int = router.top_k
        self._is_normed = bool(router.norm_topk_prob)
        make = quantised_experts if is_fp8 else ExpertWeights
        self._gate_up = make(experts.gate_up_proj.data)
        self._down = make(experts.down_proj.data)
        self._ops = ops
        self._ranks = ranks

    @property
    def num_bytes(self) -> int:
        """Of the weights here and their scales."""
        tensors = (self._router, *self._gate_up, *self._down)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T,D] -> [T,D], the same on every rank."""
        logits_TE = F.linear(x_TD, self._router)
        out: Tensor = self._ops.experts(
            x_TD, logits_TE, self._top_k, self._is_normed, self._gate_up, self._down
        )
        return self._ranks.all_reduce(out)


def quantised_experts(weight_EOI: Tensor) -> ExpertWeights:
    """Quantise each expert's matrix [out,in] to e4m3 by output, one expert at a time."""
    weight_8 = torch.empty_like(weight_EOI, dtype=torch.float8_e4m3fn)
    scale_EO = weight_EOI.new_empty(weight_EOI.shape[:2], dtype=torch.float32)
    for expert, weight in enumerate(weight_EOI):
        scale = (weight.abs().amax(dim=1).float() / FP8_MAX).clamp(min=1e-12)
        weight_8[expert] = (weight.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX)
        scale_EO[expert] = scale
    return ExpertWeights(weight_8, scale_EO)
