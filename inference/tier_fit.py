"""Which layouts of a model on one GPU type fit, how fast each is, and why the others do not fit.

A layout is (GPUs, tensor parallel, replicas, quantisation). `inference.tiers` compares them.
"""

from collections.abc import Iterator
from dataclasses import replace

from inference.hardware import GB, GpuType
from inference.model_shape import ModelShape
from inference.prediction import predict, predict_offloaded
from inference.roofline import MAX_NUM_SEQS, STATIC_NUM_SEQS, Replica
from inference.tier import Options, Refusal, Tier
from inference.tier_price import (
    LOAD_BANDWIDTH,
    PINNED_LOAD_BANDWIDTH,
    RANKS_STARTUP_S,
    STARTUP_S,
    priced,
    unmeasured_reason,
)
from inference.tier_rules import (
    needs_transformers,
    quantization_refusal,
    ranks_refusal,
    zero_refusal,
)
from inference.workload import Workload

# Replicas fail alone and need no link: tensor parallel must win by more than this.
REPLICAS_FIRST = 0.08

# Host memory that offloaded weights may take; the rest is the system's and the rows'.
HOST_MEMORY_SHARE = 0.85


def fits_on(
    shape: ModelShape, gpu: GpuType, workload: Workload, options: Options
) -> tuple[list[Tier], list[Refusal]]:
    """Every layout of `shape` on `gpu` that fits, and a refusal for every count that does not."""
    tiers: list[Tier] = []
    refusals: list[Refusal] = []
    if not gpu_counts(gpu, options):
        return [], [_too_many(gpu, options)]
    for quantization in options.quantizations if options.backend != "zero" else ():
        unusable = quantization_refusal(shape, gpu, options, quantization)
        if unusable:
            refusals.append(
                Refusal(gpu=gpu.name, num_gpus=1, quantization=quantization, reason=unusable)
            )
            continue
        replica = _replica(shape, gpu, options, quantization)
        for count in gpu_counts(gpu, options):
            found = list(_layouts(replica, count, workload, options))
            if found:
                tiers.append(_least_parallel(found))
            else:
                refusals.append(_refusal(replica, count, workload, options))
                if options.tensor_parallel_size:
                    break  # what one replica cannot do, more of them cannot either
    if not tiers and options.backend != "paged":
        reason = zero_refusal(shape, gpu, options)
        tiers = [] if reason else list(_offloaded(shape, gpu, workload, options))
        if not tiers and options.backend == "zero":
            refusals.append(_offload_refusal(shape, gpu, options, reason))
    return tiers, refusals


def _least_parallel(tiers: list[Tier]) -> Tier:
    """The smallest tensor parallel size that is about as fast as the fastest."""
    fastest = min(tier.seconds or 0.0 for tier in tiers)
    close = [tier for tier in tiers if (tier.seconds or 0.0) <= fastest * (1 + REPLICAS_FIRST)]
    return min(close, key=lambda tier: tier.tensor_parallel_size)


def gpu_counts(gpu: GpuType, options: Options) -> list[int]:
    """Numbers of GPUs to consider, smallest first: multiples of what the user has fixed."""
    fixed = _fixed_gpus(options)
    if options.replicas and options.tensor_parallel_size:
        counts = {1}
    else:
        counts = {base << power for power in range(8) for base in (1, 3)} | {gpu.max_count // fixed}
    return [fixed * count for count in sorted(counts) if 0 < fixed * count <= gpu.max_count]


def _fixed_gpus(options: Options) -> int:
    return (options.tensor_parallel_size or 1) * (options.replicas or 1)


def _too_many(gpu: GpuType, options: Options) -> Refusal:
    reason = f"a run may take {gpu.max_count} of them (max_count, or what this machine has)"
    quantization = options.quantizations[0]
    return Refusal(
        gpu=gpu.name, num_gpus=_fixed_gpus(options), quantization=quantization, reason=reason
    )


def _replica(shape: ModelShape, gpu: GpuType, options: Options, quantization: str) -> Replica:
    dtype = shape.dtype if options.dtype == "auto" else options.dtype
    is_static = needs_transformers(shape, options)
    return Replica(
        shape=shape,
        gpu=gpu,
        dtype=gpu.compute_dtype(dtype),
        quantization=quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        max_num_seqs=options.max_num_seqs or (STATIC_NUM_SEQS if is_static else MAX_NUM_SEQS),
        backend="transformers" if is_static else "paged",
    )


def _sizes(replica: Replica, count: int, options: Options) -> list[int]:
    """Tensor parallel sizes that `count` GPUs can be divided into, over several hosts whole ones only."""
    sizes = [options.tensor_parallel_size] if options.tensor_parallel_size else [1, 2, 4, 8, 16, 32]
    host = replica.gpu.gpus_per_host
    return [
        size
        for size in sizes
        if size <= count
        and count % size == 0
        and (count <= host or (host % size == 0 if size <= host else size % host == 0))
        and (options.replicas is None or count == size * options.replicas)
    ]


def _blocked(replica: Replica, size: int, options: Options) -> str:
    return ranks_refusal(replica.shape, options, replica.quantization, size)


def _layouts(replica: Replica, count: int, workload: Workload, options: Options) -> Iterator[Tier]:
    for size in _sizes(replica, count, options):
        if _blocked(replica, size, options):
            continue
        candidate = replace(replica, tensor_parallel_size=size)
        is_loadable = candidate.loading_bytes_per_gpu <= candidate.gpu.loading_bytes
        if is_loadable and candidate.kv_tokens >= workload.max_sequence_tokens:
            yield _tier(candidate, count // size, workload)


def _tier(replica: Replica, replicas: int, workload: Workload) -> Tier:
    unmeasured = unmeasured_reason(replica)
    prediction = None if unmeasured else predict(replica, workload.share(replicas))
    at_once = min(replica.kv_tokens // workload.max_sequence_tokens, replica.max_num_seqs)
    startup_s = STARTUP_S if replica.tensor_parallel_size == 1 else RANKS_STARTUP_S
    notes = [unmeasured] if unmeasured else []
    window = replica.shape.sliding_window
    if window and window < workload.max_sequence_tokens:
        notes.append(f"some layers look back {window:,} tokens only; KV is counted in full")
    if replica.spans_hosts:
        notes.append("each replica spans hosts: its all-reduces cross the network")
    if replica.dtype != replica.shape.dtype:
        notes.append(f"runs in {replica.dtype}; the weights are stored in {replica.shape.dtype}")
    return priced(
        replica,
        workload,
        num_gpus=replicas * replica.tensor_parallel_size,
        replicas=replicas,
        start_s=startup_s + replica.weight_bytes_per_gpu / LOAD_BANDWIDTH,
        generate_s=None if prediction is None else prediction.seconds,
        weight_bytes_per_gpu=replica.weight_bytes_per_gpu,
        kv_tokens=replica.kv_tokens,
        num_running=at_once if prediction is None else prediction.num_running,
        notes=tuple(notes),
    )


def _refusal(replica: Replica, count: int, workload: Workload, options: Options) -> Refusal:
    """Say why no layout of `count` GPUs works, by the one that comes closest."""
    sizes = _sizes(replica, count, options)
    possible = [size for size in sizes if not _blocked(replica, size, options)]
    blocked = [size for size in sizes if _blocked(replica, size, options)]
    reason = (
        _too_small(replace(replica, tensor_parallel_size=max(possible)), workload)
        if possible
        else ""
    )
    if blocked:
        why = _blocked(replica, min(blocked), options)
        reason = f"{reason}, and {why}" if reason else why
    if not sizes:
        reason = (
            f"{count} GPUs do not divide into tensor parallel "
            f"{options.tensor_parallel_size or 'groups'} x {options.replicas or 'any'} replicas "
            f"on hosts of {replica.gpu.gpus_per_host}"
        )
    return Refusal(
        gpu=replica.gpu.name, num_gpus=count, quantization=replica.quantization, reason=reason
    )


def _too_small(replica: Replica, workload: Workload) -> str:
    weights = replica.weight_bytes_per_gpu
    kv = workload.max_sequence_tokens * replica.kv_bytes_per_token_per_gpu
    gpu, beside, room = replica.gpu, kv, replica.gpu.usable_bytes
    what = f"{kv / GB:.2f} GB of KV cache for the longest sequence ({workload.max_sequence_tokens:,} tokens)"
    if replica.kv_tokens >= workload.max_sequence_tokens:  # loading is what it is too small for
        beside, room = replica.loading_bytes_per_gpu - weights, gpu.loading_bytes
        what = f"{beside / GB:.1f} GB of layers in {replica.dtype} while they are quantised"
    return (
        f"at tensor parallel {replica.tensor_parallel_size} a GPU needs {weights / GB:.1f} GB of weights "
        f"and {what}, {(weights + beside) / GB:.1f} GB in all, and has {room / GB:.1f} GB "
        f"of {gpu.memory_bytes / GB:.1f}"
    )


def _offload_refusal(shape: ModelShape, gpu: GpuType, options: Options, reason: str) -> Refusal:
    count = options.tensor_parallel_size or min(gpu.max_count, gpu.gpus_per_host)
    weights = _replica(shape, gpu, options, "none").weight_bytes_per_gpu
    arithmetic = (
        f"{weights / GB:.1f} GB of weights need {weights / HOST_MEMORY_SHARE / GB:.1f} GB of host memory or "
        f"{weights / GB:.1f} GB of NVMe, there are {gpu.host_memory_bytes * count / GB:.1f} and "
        f"{gpu.nvme_bytes * count / GB:.1f}; two layers and the longest sequence must fit on a GPU"
    )
    return Refusal(gpu=gpu.name, num_gpus=count, quantization="none", reason=reason or arithmetic)


def _offloaded(
    shape: ModelShape, gpu: GpuType, workload: Workload, options: Options
) -> Iterator[Tier]:
    """Layouts that keep the weights in host memory, or failing that on NVMe, on one host."""
    backend = "transformers" if options.backend == "transformers" else "zero"
    replica = replace(_replica(shape, gpu, options, "none"), backend=backend)
    if backend == "zero":
        replica = replace(replica, max_num_seqs=options.max_num_seqs or MAX_NUM_SEQS)
    weights = replica.weight_bytes_per_gpu
    layers = 2 * weights / shape.num_layers
    room = int((gpu.usable_bytes - layers) // replica.kv_bytes_per_token_per_gpu)
    for count in gpu_counts(gpu, options):
        if count > gpu.gpus_per_host or options.tensor_parallel_size not in (None, count):
            return
        if backend == "transformers" and count > 1:
            return
        if weights <= HOST_MEMORY_SHARE * gpu.host_memory_bytes * count:
            offload, bandwidth = "cpu", gpu.pcie_bandwidth
        elif weights <= gpu.nvme_bytes * count:
            offload, bandwidth = "nvme", min(gpu.nvme_bandwidth, gpu.pcie_bandwidth)
        else:
            continue
        if room < workload.max_sequence_tokens:
            continue
        unmeasured = unmeasured_reason(replica, offload)
        prediction, pass_s = predict_offloaded(
            replica, workload, source_bandwidth=bandwidth, num_ranks=count
        )
        moved = (
            f"every step moves {weights / GB:.0f} GB of weights through the GPUs: {pass_s:.1f} s"
        )
        yield priced(
            replica,
            workload,
            num_gpus=count,
            replicas=1,
            start_s=STARTUP_S + weights / count / PINNED_LOAD_BANDWIDTH,
            generate_s=None if unmeasured else prediction.seconds,
            weight_bytes_per_gpu=int(layers),
            kv_tokens=room,
            num_running=prediction.num_running,
            notes=(unmeasured or moved,),
            offload=offload,
        )
