"""Kernels: the few operations the paged engine does not leave to torch.

`plain` writes each of them in torch, for the CPU and as the tests' oracle; `fused` gives the same functions
on Triton kernels. A model takes one of the two modules and never asks which.
"""
