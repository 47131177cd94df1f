"""What the driver says of this replica's GPUs: of the first, utilisation, memory, power. Silent without one."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One reading; None for what this device does not tell, such as utilisation in a MIG slice."""

    utilisation: float | None
    """Share of the last moments in which a kernel ran, 0 to 1."""

    memory_bytes: int | None
    power_w: float | None


def open_gpu() -> Any | None:
    """Return the driver's handle of this process's first GPU, or None: no driver, library or GPU."""
    try:
        import pynvml  # nvidia-ml-py, an optional dependency
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
        return _handle(visible)
    except pynvml.NVMLError:
        return None


def gpu_bytes() -> list[int] | None:
    """Return the memory of each GPU this process may use; None: no driver or library to ask."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        everyone = ",".join(map(str, range(pynvml.nvmlDeviceGetCount())))
        names = os.environ.get("CUDA_VISIBLE_DEVICES", everyone).split(",")
        handles = [_handle(name.strip()) for name in names if name.strip()]
        return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]
    except pynvml.NVMLError:
        return None


def _handle(name: str) -> Any:
    """The driver's handle of a GPU, by what CUDA_VISIBLE_DEVICES calls it. Raises NVMLError."""
    import pynvml

    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def sample(handle: Any) -> GpuSample | None:
    """Read the GPU; None if the driver will not say anything."""
    import pynvml

    def ask(question: Callable[[Any], Any]) -> Any | None:
        try:
            return question(handle)
        except pynvml.NVMLError:
            return None

    rates = ask(pynvml.nvmlDeviceGetUtilizationRates)
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo)
    milliwatts = ask(pynvml.nvmlDeviceGetPowerUsage)
    if rates is None and memory is None and milliwatts is None:
        return None
    return GpuSample(
        utilisation=None if rates is None else rates.gpu / 100,
        memory_bytes=None if memory is None else int(memory.used),
        power_w=None if milliwatts is None else milliwatts / 1000,
    )


def summary(samples: Sequence[GpuSample]) -> dict[str, float] | None:
    """Return means and peaks of what was told; None without a reading."""
    rates = [s.utilisation for s in samples if s.utilisation is not None]
    memory = [s.memory_bytes for s in samples if s.memory_bytes is not None]
    watts = [s.power_w for s in samples if s.power_w is not None]
    found: dict[str, float] = {}
    if rates:
        found["mean_utilisation"] = round(fmean(rates), 4)
    if memory:
        found["peak_memory_bytes"] = max(memory)
    if watts:
        found["mean_power_w"] = round(fmean(watts), 1)
    return found or None


class DeviceSampler:
    """Reads the GPU every few seconds in a thread, for receipts; does nothing without one."""

    def __init__(self, handle: Any | None, *, every_s: float = 5.0) -> None:
        self._handle = handle
        self._every_s = every_s
        self._samples: list[GpuSample] = []
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="nightjar-gpu", daemon=True)
        if handle is not None:
            self._thread.start()

    def take(self) -> dict[str, float] | None:
        """Return the `summary` since the last call; None without a reading."""
        with self._lock:
            samples, self._samples = self._samples, []
        return summary(samples)

    def close(self) -> None:
        """End the thread. Safe to repeat."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while not self._done.wait(self._every_s):
            found = sample(self._handle)
            if found is not None:
                with self._lock:
                    self._samples.append(found)
