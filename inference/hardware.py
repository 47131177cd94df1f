"""GpuType: what one kind of GPU can do, and the plain-dict form it is read from.

Whoever reads the hardware file (YAML is not known here) hands over one mapping for each GPU type.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from inference.errors import EngineConfigError

GB = 1e9

# Achieved shares on an H100 with torch 2.11: 740 of 989 TFLOP/s in bf16 and 1,260 of 1,979 in fp8
# at the shapes of an 8B model, 2.8 of 3.35 TB/s, 329 of 450 GB/s for an all-reduce over two GPUs.
GEMM_EFFICIENCY = 0.75
FP8_GEMM_EFFICIENCY = 0.64
BANDWIDTH_EFFICIENCY = 0.84
LINK_EFFICIENCY = 0.73

# What the driver, the context, the graphs and the activations of a step take: a part that grows with
# the card (larger batches) and a part that does not.
RESERVED_BYTES = 1.5e9
RESERVED_SHARE = 0.04


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuType:
    """One kind of GPU, in bytes, bytes a second and dense FLOP/s."""

    name: str
    memory_bytes: float
    bandwidth: float
    flops: Mapping[str, float]
    """By element type; what is absent cannot be computed with."""

    link: str = "pcie"
    link_bandwidth: float = 12 * GB
    """To the other GPUs of the host, one direction."""

    network_bandwidth: float = 3 * GB
    """To GPUs of other hosts, one direction, one GPU."""

    pcie_bandwidth: float = 24 * GB
    host_memory_bytes: float = 0.0
    """Host memory for one GPU."""

    nvme_bytes: float = 0.0
    nvme_bandwidth: float = 2 * GB
    gpus_per_host: int = 8
    max_count: int = 16
    price_per_hour: float | None = None
    """US dollars for one GPU; None when the user has not said."""

    gemm_efficiency: float | None = None
    bandwidth_efficiency: float = BANDWIDTH_EFFICIENCY

    @property
    def usable_bytes(self) -> float:
        """Memory left for weights and KV cache."""
        return self.memory_bytes * (1 - RESERVED_SHARE) - RESERVED_BYTES

    @property
    def loading_bytes(self) -> float:
        """Memory left for weights while they are loaded, when there are no graphs and no steps yet."""
        return self.memory_bytes * (1 - RESERVED_SHARE)

    def compute_dtype(self, dtype: str) -> str:
        """The element type a model of `dtype` runs in here: float16 where bfloat16 is missing."""
        return "float16" if dtype == "bfloat16" and dtype not in self.flops else dtype

    def achieved_flops(self, dtype: str) -> float:
        """FLOP/s large matrix products reach, not the data sheet's."""
        default = FP8_GEMM_EFFICIENCY if dtype in ("fp8", "int8") else GEMM_EFFICIENCY
        return self.flops[dtype] * (self.gemm_efficiency or default)

    @property
    def achieved_bandwidth(self) -> float:
        """Bytes a second streaming kernels reach."""
        return self.bandwidth * self.bandwidth_efficiency


def gpu_type(name: str, values: Mapping[str, Any]) -> GpuType:
    """Read one entry of the hardware file.

    Raises:
        EngineConfigError: a key is unknown or missing, or a value is not a positive number.
    """
    _check_keys(name, values)
    efficiency = values.get("efficiency") or {}
    kwargs: dict[str, Any] = {
        field: _number(name, key, values[key]) * scale
        for key, (field, scale) in _NUMBERS.items()
        if key in values
    }
    price = values.get("price_per_hour")
    return GpuType(
        name=name,
        flops={
            dtype: _number(name, f"tflops.{dtype}", value) * 1e12
            for dtype, value in values["tflops"].items()
            if value is not None
        },
        link=str(values.get("link", "pcie")),
        gpus_per_host=int(_number(name, "gpus_per_host", values.get("gpus_per_host", 8))),
        max_count=int(_number(name, "max_count", values.get("max_count", 16))),
        price_per_hour=None if price is None else _number(name, "price_per_hour", price),
        gemm_efficiency=efficiency.get("gemm"),
        bandwidth_efficiency=efficiency.get("bandwidth", BANDWIDTH_EFFICIENCY),
        **kwargs,
    )


def gpu_types(hardware: Mapping[str, Mapping[str, Any]]) -> list[GpuType]:
    """Read every entry of the hardware file, in its order."""
    return [gpu_type(name, values) for name, values in hardware.items()]


def match_gpu(device_name: str, memory_bytes: float, known: Iterable[GpuType]) -> GpuType | None:
    """The known type of a device the driver calls `device_name`; None when there is none.

    Types that differ only in memory, such as A100-40 and A100-80, are told apart by it; a variant that has an
    entry of its own, such as H100-PCIE, is not taken for the type without one.
    """
    named = [gpu for gpu in known if is_called(gpu.name, device_name)]
    near = [gpu for gpu in named if abs(gpu.memory_bytes - memory_bytes) < 0.15 * gpu.memory_bytes]
    return min(
        near,
        key=lambda gpu: (-len(_words(gpu.name)), abs(gpu.memory_bytes - memory_bytes)),
        default=None,
    )


def is_called(name: str, device_name: str) -> bool:
    """Whether a device that the driver calls `device_name` may be of the GPU type `name`."""
    words = device_name.upper().replace("-", " ").split()
    return _words(name) <= {_SOLD_AS.get(word, word) for word in words}


def _words(name: str) -> set[str]:
    """The words of a GPU type's name, without its memory."""
    return {word for word in name.upper().split("-") if not word.isdigit()}


# What the driver calls a variant that is sized as another type: the A10 of AWS's g5.
_SOLD_AS = {"A10G": "A10"}

# key in the file -> (field, factor to bytes or bytes a second)
_NUMBERS = {
    "memory_gb": ("memory_bytes", GB),
    "bandwidth_gb_s": ("bandwidth", GB),
    "link_gb_s": ("link_bandwidth", GB),
    "network_gb_s": ("network_bandwidth", GB),
    "pcie_gb_s": ("pcie_bandwidth", GB),
    "host_memory_gb": ("host_memory_bytes", GB),
    "nvme_gb": ("nvme_bytes", GB),
    "nvme_gb_s": ("nvme_bandwidth", GB),
}
_OTHER_KEYS = ("tflops", "link", "gpus_per_host", "max_count", "price_per_hour", "efficiency")
_REQUIRED = ("memory_gb", "bandwidth_gb_s", "tflops")


def _check_keys(name: str, values: Mapping[str, Any]) -> None:
    known = [*_NUMBERS, *_OTHER_KEYS]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise EngineConfigError(f"hardware {name}: unknown key {key!r}{hint}")
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise EngineConfigError(
            f"hardware {name}: {', '.join(missing)} missing; add it to the entry"
        )
    if not isinstance(values["tflops"], Mapping) or not values["tflops"]:
        raise EngineConfigError(f"hardware {name}: tflops must name at least one element type")


def _number(name: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise EngineConfigError(f"hardware {name}: {key} is {value!r}; give a number above 0")
    return float(value)
