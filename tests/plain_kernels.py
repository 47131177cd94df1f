"""A paged model on plain operations whose runner takes them for kernels: quick without a GPU, sampled by Triton."""

from types import ModuleType

from inference.kernels import plain
from inference.model import PagedModel, make_paged_model
from tests.paged_cases import model_of


def plain_ops_taken_for_kernels() -> ModuleType:
    ops = ModuleType("plain_operations")
    vars(ops).update(vars(plain))
    return ops


def plain_model_sampled_by_kernels(family: str) -> PagedModel:
    return make_paged_model(model_of(family), plain_ops_taken_for_kernels())
