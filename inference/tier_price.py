"""What a layout that fits takes: how long a start is, what may be predicted, and what the hours cost."""

from inference.hardware import GB
from inference.roofline import Replica
from inference.tier import Tier
from inference.workload import Workload

# Measured, in tests/benchmarks/results/. forecast_h100_202611.md: 15.9 s to the first token of 16.4 GB in /dev/shm
# with no kernel compiled before, of which a first call's 11.7 GB/s (load_h100_202611.md) are 1.4 s.
STARTUP_S = 14.5
# ranks_h100_202611.md: two ranks are ready after 28 s, 2.4 s of it for their weights.
RANKS_STARTUP_S = 25.6
# load_h100_202611.md: from disk to the GPU, 8 threads, the slower of two machines.
LOAD_BANDWIDTH = 1.66 * GB
# zero_h100_202611.md: 65.5 GB into pinned host memory in 69 s, the last of three loads.
PINNED_LOAD_BANDWIDTH = 0.95 * GB


def unmeasured_reason(replica: Replica, offload: str = "none") -> str:
    """Why nothing is predicted of a layout; empty where predictions were held against runs."""
    if replica.backend == "transformers" and offload != "none":
        return "speed not predicted: no run of the transformers backend with offloaded weights was measured"
    if replica.shape.stored_quantization == "awq":
        return "speed not predicted: no run with awq weights was measured"
    return ""


def priced(
    replica: Replica,
    workload: Workload,
    *,
    num_gpus: int,
    replicas: int,
    start_s: float,
    generate_s: float | None,
    weight_bytes_per_gpu: int,
    kv_tokens: int,
    num_running: float,
    notes: tuple[str, ...],
    offload: str = "none",
) -> Tier:
    """Turn seconds of generation into rates, hours and, where the GPU has a price, dollars; None stays None."""
    gpu = replica.gpu
    completion = workload.num_completion_tokens
    usd_per_hour = None if gpu.price_per_hour is None else gpu.price_per_hour * num_gpus
    rate = total_rate = seconds = usd = per_million = None
    if generate_s is not None:
        generate_s = max(generate_s, 1e-9)
        seconds = start_s + generate_s
        rate = completion / generate_s
        total_rate = (completion + workload.num_prompt_tokens) / generate_s
    if usd_per_hour is not None and seconds is not None:
        usd = usd_per_hour * seconds / 3600
        per_million = usd_per_hour / 3600 / rate * 1e6 if rate else None
    return Tier(
        gpu=gpu.name,
        num_gpus=num_gpus,
        memory_bytes=num_gpus * gpu.memory_bytes,
        tensor_parallel_size=replica.tensor_parallel_size,
        replicas=replicas,
        quantization=replica.quantization,
        dtype=replica.dtype,
        kv_cache_dtype=replica.kv_cache_dtype,
        backend=replica.backend,
        offload=offload,
        num_hosts=-(-num_gpus // gpu.gpus_per_host),
        weight_bytes_per_gpu=weight_bytes_per_gpu,
        kv_bytes_per_gpu=int(kv_tokens * replica.kv_bytes_per_token_per_gpu),
        kv_tokens=kv_tokens,
        num_running=max(int(num_running), 1),
        completion_tokens_per_s=rate,
        total_tokens_per_s=total_rate,
        seconds=seconds,
        usd_per_hour=usd_per_hour,
        usd=usd,
        usd_per_million_tokens=per_million,
        notes=notes,
    )
