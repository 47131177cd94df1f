"""Host memory that a job's engine will need on this machine, beside weights that lie in /dev/shm."""

import math
from collections.abc import Sequence
from pathlib import Path

from storage.destinations import EngineMemory
from storage.staging import PROCESS_BYTES
from tasks.gpu_sample import gpu_bytes
from tasks.job import RunConfig
from tasks.provision import MEMORY_BYTES_PER_GPU

_MAX_WEIGHT_SHARE = 0.85
"""Of a GPU's memory, what weights may take before the backends look for another place."""

_GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")


def engine_memory(
    job: RunConfig, weight_bytes: int, gpus: Sequence[int] | None = None
) -> EngineMemory:
    """Say what one replica will need, before its model is here to be asked.

    Args:
        weight_bytes: of the model's files.
        gpus: memory of each GPU that the replica has here, in bytes; default: this machine's.
    """
    gpus = _visible_gpus(job) if gpus is None else gpus
    return EngineMemory.sum_of(
        {
            "the process and its rows": PROCESS_BYTES,
            f"pinned buffers of {len(gpus)} GPUs": MEMORY_BYTES_PER_GPU * len(gpus),
            "weights in host memory": _host_weight_bytes(job, weight_bytes, gpus),
        }
    )


def _host_weight_bytes(job: RunConfig, weight_bytes: int, gpus: Sequence[int]) -> int:
    """Bytes of weights that are held in host memory once more; see `inference.offload`."""
    backend, offload = job.engine.backend, job.engine.offload
    # Most models are stored in two bytes a number.
    loaded = weight_bytes * 2 if job.model.dtype == "float32" else weight_bytes
    if not gpus:
        return 0 if (backend, offload) == ("zero", "nvme") else loaded
    is_kept_off = backend == "paged" or offload in ("none", "nvme")
    if is_kept_off or job.model.quantization != "none":
        return 0
    left = max(0, loaded - int(_MAX_WEIGHT_SHARE * sum(gpus)))
    if backend == "zero" or (backend == "auto" and left):
        return loaded  # zero keeps all of them there
    return left


def _visible_gpus(job: RunConfig) -> list[int]:
    found = gpu_bytes()
    if found is None and any(list(Path("/dev").glob(pattern)) for pattern in _GPU_FILES):
        import torch  # heavy, and the model's first byte waits for it

        gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        found = [gpu.total_memory for gpu in gpus]
    found = found or []
    if job.engine.tensor_parallel_size == "auto":
        return found
    return found[: math.ceil(job.engine.tensor_parallel_size / job.engine.distributed.num_hosts)]
