"""Which layouts of a model on one GPU type fit, how fast each is, and why the others do not fit.

A layout is (GPUs, tensor parallel, replicas, quantisation). `inference.tiers` compares them.
"""

from collections.abc import Iterator
from dataclasses import replace

from inference.families import EXPERT_MODEL_TYPES, UNCUT_MODEL_TYPES
from inference.hardware import GB, GpuType
from inference.heads import heads_refusal
from inference.model_shape import ModelShape
from inference.prediction import predict, predict_offloaded
from inference.roofline import Replica, Workload
from inference.tier import BITSANDBYTES, Options, Refusal, Tier

# Start-up of a replica: processes, compilation and capture, then weights from disk. Not yet measured.
STARTUP_S = 60.0
LOAD_BANDWIDTH = 1.5 * GB

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
        unusable = _unusable(shape, gpu, options, quantization)
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
    if not tiers and options.backend in ("auto", "zero"):
        reason = _not_offloaded(shape, gpu, options)
        tiers = [] if reason else list(_offloaded(shape, gpu, workload, options))
        if not tiers and options.backend == "zero":
            refusals.append(_offload_refusal(shape, gpu, options, reason))
    return tiers, refusals


def _least_parallel(tiers: list[Tier]) -> Tier:
    """The smallest tensor parallel size that is about as fast as the fastest."""
    fastest = min(tier.seconds for tier in tiers)
    close = [tier for tier in tiers if tier.seconds <= fastest * (1 + REPLICAS_FIRST)]
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


def _no_arithmetic(shape: ModelShape, gpu: GpuType, options: Options) -> str:
    dtype = shape.dtype if options.dtype == "auto" else options.dtype
    if gpu.compute_dtype(dtype) not in gpu.flops:
        return f"has no {dtype} arithmetic; use another GPU type or model.dtype"
    return ""


def _unusable(shape: ModelShape, gpu: GpuType, options: Options, quantization: str) -> str:
    """Why `quantization` cannot run here at all; empty when it can."""
    reason = _no_arithmetic(shape, gpu, options) or _unpaged(shape, options)
    if reason:
        return reason
    if quantization == "fp8" and not shape.is_fused:
        return f"fp8 is not available for model_type {shape.family}; use none"
    if shape.stored_quantization == "fp8" and quantization == "fp8" and "fp8" in gpu.flops:
        return ""
    if quantization != "none" and shape.stored_quantization:
        return (
            f"the checkpoint is stored as {shape.stored_quantization} already; "
            f"use quantization none, or the unquantised checkpoint for {quantization}"
        )
    if quantization == "fp8" and "fp8" not in gpu.flops:
        return "has no fp8 arithmetic; use int8 or nf4 for capacity"
    if quantization in BITSANDBYTES and shape.num_expert_params:
        return (
            f"bitsandbytes leaves the experts whole ({shape.num_expert_params / 1e9:.1f} of "
            f"{shape.num_params / 1e9:.1f} billion parameters); use fp8"
        )
    return ""


def _unpaged(shape: ModelShape, options: Options) -> str:
    """Why the options keep the model from the one backend that runs it; empty when they do not."""
    if not _needs_transformers(shape):
        return ""
    if options.backend == "paged":
        kind = shape.stored_quantization or f"model_type {shape.family}"
        return f"the paged backend does not run {kind}; use engine.backend transformers"
    if options.kv_cache_dtype not in ("auto", options.dtype):
        return f"the transformers backend keeps no KV cache in {options.kv_cache_dtype}; use auto"
    return ""


def _needs_transformers(shape: ModelShape) -> bool:
    return not shape.is_paged or shape.stored_quantization in ("gptq", "awq")


def _replica(shape: ModelShape, gpu: GpuType, options: Options, quantization: str) -> Replica:
    dtype = shape.dtype if options.dtype == "auto" else options.dtype
    return Replica(
        shape=shape,
        gpu=gpu,
        dtype=gpu.compute_dtype(dtype),
        quantization=quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        max_num_seqs=options.max_num_seqs,
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


def _blocked(replica: Replica, size: int) -> str:
    """Why `size` ranks cannot hold the model between them; empty when they can."""
    shape = replica.shape
    heads = heads_refusal(
        size, num_heads=shape.num_attention_heads, num_kv_heads=shape.num_key_value_heads
    )
    if heads or size == 1:
        return heads
    is_known = shape.stored_quantization in (None, "fp8")
    if not is_known or replica.quantization in BITSANDBYTES:
        method = shape.stored_quantization or replica.quantization
        return f"ranks cannot share weights quantised as {method}"
    return _uncut(shape, size)


def _uncut(shape: ModelShape, size: int) -> str:
    """Why ranks cannot share a model of this kind; empty when they can."""
    if not shape.is_paged:
        return f"model_type {shape.family} needs the transformers backend, which runs on one GPU"
    if shape.num_expert_params and shape.family not in EXPERT_MODEL_TYPES:
        return f"ranks cannot share the experts of model_type {shape.family}"
    if shape.expert_size % size:
        return f"tensor parallel {size} does not divide the experts' intermediate size {shape.expert_size}"
    if shape.family in UNCUT_MODEL_TYPES:
        return f"ranks cannot share the layers of model_type {shape.family}"
    return ""


def _layouts(replica: Replica, count: int, workload: Workload, options: Options) -> Iterator[Tier]:
    for size in _sizes(replica, count, options):
        if _blocked(replica, size):
            continue
        candidate = replace(replica, tensor_parallel_size=size)
        if candidate.kv_tokens >= workload.max_sequence_tokens:
            yield _tier(candidate, count // size, workload)


def _tier(replica: Replica, replicas: int, workload: Workload) -> Tier:
    prediction = predict(replica, workload.share(replicas))
    notes = []
    window = replica.shape.sliding_window
    if window and window < workload.max_sequence_tokens:
        notes.append(f"some layers look back {window:,} tokens only; KV is counted in full")
    if replica.spans_hosts:
        notes.append("each replica spans hosts: its all-reduces cross the network")
    if replica.dtype != replica.shape.dtype:
        notes.append(f"runs in {replica.dtype}; the weights are stored in {replica.shape.dtype}")
    return _priced(
        replica,
        workload,
        num_gpus=replicas * replica.tensor_parallel_size,
        replicas=replicas,
        generate_s=prediction.seconds,
        load_bytes=replica.weight_bytes_per_gpu,
        weight_bytes_per_gpu=replica.weight_bytes_per_gpu,
        kv_tokens=replica.kv_tokens,
        num_running=prediction.num_running,
        notes=tuple(notes),
    )


def _priced(
    replica: Replica,
    workload: Workload,
    *,
    num_gpus: int,
    replicas: int,
    generate_s: float,
    load_bytes: float,
    weight_bytes_per_gpu: int,
    kv_tokens: int,
    num_running: float,
    notes: tuple[str, ...],
    offload: str = "none",
) -> Tier:
    """Turn seconds of generation into rates, hours and, where the GPU has a price, dollars."""
    gpu = replica.gpu
    generate_s = max(generate_s, 1e-9)
    seconds = STARTUP_S + load_bytes / LOAD_BANDWIDTH + generate_s
    completion = workload.num_completion_tokens
    usd_per_s = None if gpu.price_per_hour is None else gpu.price_per_hour * num_gpus / 3600
    per_million = None
    if usd_per_s is not None and completion > 0:
        per_million = usd_per_s * generate_s / completion * 1e6
    return Tier(
        gpu=gpu.name,
        num_gpus=num_gpus,
        tensor_parallel_size=replica.tensor_parallel_size,
        replicas=replicas,
        quantization=replica.quantization,
        dtype=replica.dtype,
        kv_cache_dtype=replica.kv_cache_dtype,
        backend=_backend(replica, offload),
        offload=offload,
        num_hosts=-(-num_gpus // gpu.gpus_per_host),
        weight_bytes_per_gpu=weight_bytes_per_gpu,
        kv_tokens=kv_tokens,
        num_running=max(int(num_running), 1),
        completion_tokens_per_s=completion / generate_s,
        total_tokens_per_s=(completion + workload.num_prompt_tokens) / generate_s,
        seconds=seconds,
        usd=None if usd_per_s is None else usd_per_s * seconds,
        usd_per_million_tokens=per_million,
        notes=notes,
    )


def _backend(replica: Replica, offload: str) -> str:
    if offload != "none":
        return "zero"
    return "transformers" if _needs_transformers(replica.shape) else "paged"


def _refusal(replica: Replica, count: int, workload: Workload, options: Options) -> Refusal:
    """Say why no layout of `count` GPUs works, by the one that comes closest."""
    sizes = _sizes(replica, count, options)
    possible = [size for size in sizes if not _blocked(replica, size)]
    blocked = [size for size in sizes if _blocked(replica, size)]
    reason = (
        _too_small(replace(replica, tensor_parallel_size=max(possible)), workload)
        if possible
        else ""
    )
    if blocked:
        why = _blocked(replica, min(blocked))
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
    gpu = replica.gpu
    return (
        f"at tensor parallel {replica.tensor_parallel_size} a GPU needs {weights / GB:.1f} GB of weights "
        f"and {kv / GB:.2f} GB of KV cache for the longest sequence ({workload.max_sequence_tokens:,} "
        f"tokens), {(weights + kv) / GB:.1f} GB in all, and has {gpu.usable_bytes / GB:.1f} GB "
        f"of {gpu.memory_bytes / GB:.1f}"
    )


def _not_offloaded(shape: ModelShape, gpu: GpuType, options: Options) -> str:
    """Why weights cannot be kept off these GPUs, however much memory there is; empty when they can."""
    size = options.tensor_parallel_size or 1
    if "none" not in options.quantizations:
        return "the zero backend moves weights as they are stored; use quantization none"
    if shape.stored_quantization:
        return (
            f"the zero backend cannot share out weights stored as {shape.stored_quantization}; "
            "use the unquantised checkpoint"
        )
    if options.kv_cache_dtype not in ("auto", options.dtype):
        return f"the zero backend keeps no KV cache in {options.kv_cache_dtype}; use auto"
    if (options.replicas or 1) > 1:
        return f"the zero backend runs one replica and {options.replicas} are asked for; use 1"
    if size > gpu.gpus_per_host:
        return f"the zero backend keeps to one host, of {gpu.gpus_per_host} GPUs; use no more"
    reason = _no_arithmetic(shape, gpu, options)
    if not reason and options.backend == "auto":
        reason = _blocked(_replica(shape, gpu, options, "none"), size)
    return reason


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
    replica = _replica(shape, gpu, options, "none")
    weights = replica.weight_bytes_per_gpu
    for count in gpu_counts(gpu, options):
        if count > gpu.gpus_per_host or options.tensor_parallel_size not in (None, count):
            return
        if weights <= HOST_MEMORY_SHARE * gpu.host_memory_bytes * count:
            offload, bandwidth = "cpu", gpu.pcie_bandwidth
        elif weights <= gpu.nvme_bytes * count:
            offload, bandwidth = "nvme", min(gpu.nvme_bandwidth, gpu.pcie_bandwidth)
        else:
            continue
        prediction, pass_s = predict_offloaded(
            replica, workload, source_bandwidth=bandwidth, num_ranks=count
        )
        layers = 2 * weights / shape.num_layers
        room = int((gpu.usable_bytes - layers) // replica.kv_bytes_per_token_per_gpu)
        if room < workload.max_sequence_tokens:
            continue
        note = f"every step moves {weights / GB:.0f} GB of weights through the GPUs: {pass_s:.1f} s"
        yield _priced(
            replica,
            workload,
            num_gpus=count,
            replicas=1,
            generate_s=prediction.seconds,
            load_bytes=weights / count,
            weight_bytes_per_gpu=int(layers),
            kv_tokens=room,
            num_running=prediction.num_running,
            notes=(note,),
            offload=offload,
        )
