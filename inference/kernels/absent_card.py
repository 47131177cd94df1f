"""AbsentCard: a CUDA device as Triton sees it, where there is none: kernels can be compiled for it, not run.

Made active, it answers what Triton asks of the device before a launch, from numbers that were read elsewhere. So a
process can compile for a device without a context on it, which would take half a gigabyte of its memory.

Triton builds small C extensions besides kernels: one for the device, and before 3.7 one to launch each signature of a
kernel. Those that are built here are Triton's own; they need CUDA's driver library, and no device.
"""

from typing import Any, NoReturn

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

from inference.precompile import CardFacts


class Utils:
    """What Triton's own driver has under this name; all but the properties comes from the device's extension."""

    def __init__(self, facts: CardFacts) -> None:
        self._facts = facts
        self._extension: Any = None

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Those that are known without a context."""
        return {"multiprocessor_count": self._facts.num_multiprocessors}

    def extension(self) -> Any:
        """The device's extension, which is built if it is not in Triton's cache."""
        self._extension = self._extension or CudaUtils()
        return self._extension

    def __getattr__(self, name: str) -> Any:
        return getattr(self.extension(), name)


class AbsentCard(DriverBase):  # type: ignore[misc]
    """A driver for `triton.runtime.driver.set_active`."""

    def __init__(self, facts: CardFacts) -> None:
        self._facts = facts
        self.utils = Utils(facts)
        self.launcher_cls = CudaLauncher
        """What makes a kernel's launcher; builds it, where it needs to be."""

    @classmethod
    def is_active(cls) -> bool:
        """Never found by Triton on its own."""
        return False

    def activate(self) -> None:
        """Have Triton compile for this card from now on, in this process."""
        triton.runtime.driver.set_active(self)

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self._facts.capability, 32)

    def get_current_device(self) -> int:
        """The number under which Triton keeps what it has compiled."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors of this card are."""
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> NoReturn:
        """For launchers, which there are none of."""
        raise NotImplementedError(f"an absent card launches nothing, so {ty} needs no C++ type")

    def get_benchmarker(self) -> Any:
        """For autotuning."""
        raise NotImplementedError("nothing can be timed on an absent card")
