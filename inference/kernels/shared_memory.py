"""How much shared memory a program may have on the device that kernels are compiled for."""

import triton

from inference.kernels.experts import gate_up_kernel

_KIB = {75: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
"""By compute capability (CUDA C++ Programming Guide, technical specifications)."""

_LEAST_KIB = 99
"""As 8.6, 8.9 and 12.x have."""

_AMD_KIB = 64

IS_COMPILED = isinstance(gate_up_kernel, triton.JITFunction)
"""Kernels are compiled, not interpreted."""


def architecture() -> int | str:
    """Return the device's as Triton names it: 90, or gfx942; 90 for Triton's interpreter."""
    if not IS_COMPILED:
        return 90
    arch: int | str = triton.runtime.driver.active.get_current_target().arch
    return arch


def shared_bytes(arch: int | str) -> int:
    """Return the shared memory that a program may have on an architecture."""
    return (_AMD_KIB if isinstance(arch, str) else _KIB.get(arch, _LEAST_KIB)) << 10
