"""What the driver says of this replica's first GPU: utilisation, memory, power. Silent without one."""

import os
import threading
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One reading."""

    utilisation: float
    """Share of the last moments in which a kernel ran, 0 to 1."""

    memory_bytes: int
    power_w: float


def open_gpu() -> Any | None:
    """Return the driver's handle of this process's first GPU, or None: no driver, library or GPU."""
    try:
        import pynvml  # nvidia-ml-py, an optional dependency
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
        if visible.isdigit():
            return pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        return pynvml.nvmlDeviceGetHandleByUUID(visible)
    except pynvml.NVMLError:
        return None


def sample(handle: Any) -> GpuSample | None:
    """Read the GPU; None if the driver will not say."""
    import pynvml

    try:
        return GpuSample(
            utilisation=pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
            power_w=pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        )
    except pynvml.NVMLError:
        return None


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
        """Return means since the last call; None without a reading."""
        with self._lock:
            samples, self._samples = self._samples, []
        if not samples:
            return None
        count = len(samples)
        return {
            "mean_utilisation": round(sum(s.utilisation for s in samples) / count, 4),
            "peak_memory_bytes": max(s.memory_bytes for s in samples),
            "mean_power_w": round(sum(s.power_w for s in samples) / count, 1),
        }

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
