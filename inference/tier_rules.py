"""What a model, a GPU type and the user's options allow at all: said in words, before any arithmetic of sizes.

Each function returns why something cannot be, and an empty text where it can.
"""

from inference.families import EXPERT_MODEL_TYPES, UNCUT_MODEL_TYPES
from inference.hardware import GpuType
from inference.heads import heads_refusal
from inference.model_shape import ModelShape
from inference.tier import BITSANDBYTES, Options


def needs_transformers(shape: ModelShape, options: Options) -> bool:
    """Whether only the transformers backend is left: by what is asked for, or by what paged does not run."""
    if options.backend == "transformers":
        return True
    return not shape.is_paged or shape.stored_quantization in ("gptq", "awq")


def quantization_refusal(
    shape: ModelShape, gpu: GpuType, options: Options, quantization: str
) -> str:
    """Why `quantization` cannot run here at all."""
    reason = arithmetic_refusal(shape, gpu, options) or _backend_refusal(shape, options)
    if reason:
        return reason
    if quantization == "fp8" and needs_transformers(shape, options) and shape.is_fused:
        return "the transformers backend does not run fp8; use none, int8 or nf4"
    if shape.stored_quantization == "fp8" and quantization == "fp8" and "fp8" in gpu.flops:
        return ""
    if quantization != "none" and shape.stored_quantization:
        return (
            f"the checkpoint is stored as {shape.stored_quantization} already; "
            f"use quantization none, or the unquantised checkpoint for {quantization}"
        )
    if quantization == "fp8" and not shape.is_fused:
        return f"fp8 is not available for model_type {shape.family}; use none"
    if quantization == "fp8" and "fp8" not in gpu.flops:
        return "has no fp8 arithmetic; use int8 or nf4 for capacity"
    if quantization in BITSANDBYTES and shape.num_expert_params:
        return (
            f"bitsandbytes leaves the experts whole ({shape.num_expert_params / 1e9:.1f} of "
            f"{shape.num_params / 1e9:.1f} billion parameters); use fp8"
        )
    return ""


def arithmetic_refusal(shape: ModelShape, gpu: GpuType, options: Options) -> str:
    """Why the GPU cannot compute in the model's element type."""
    dtype = shape.dtype if options.dtype == "auto" else options.dtype
    if gpu.compute_dtype(dtype) not in gpu.flops:
        return f"has no {dtype} arithmetic; use another GPU type or model.dtype"
    return ""


def ranks_refusal(shape: ModelShape, options: Options, quantization: str, size: int) -> str:
    """Why `size` ranks cannot hold the model between them."""
    heads = heads_refusal(
        size, num_heads=shape.num_attention_heads, num_kv_heads=shape.num_key_value_heads
    )
    if heads or size == 1:
        return heads
    is_known = shape.stored_quantization in (None, "fp8")
    if not is_known or quantization in BITSANDBYTES:
        method = shape.stored_quantization or quantization
        return f"ranks cannot share weights quantised as {method}"
    if options.backend == "transformers":
        return "the transformers backend runs on one GPU"
    return _layers_refusal(shape, size)


def zero_refusal(shape: ModelShape, gpu: GpuType, options: Options) -> str:
    """Why weights cannot pass through these GPUs, however much memory there is beside them."""
    size = options.tensor_parallel_size or 1
    name = "transformers" if options.backend == "transformers" else "zero"
    if "none" not in options.quantizations:
        return f"the {name} backend moves weights as they are stored; use quantization none"
    if shape.stored_quantization:
        return (
            f"the {name} backend cannot share out weights stored as {shape.stored_quantization}; "
            "use the unquantised checkpoint"
        )
    if options.kv_cache_dtype not in ("auto", options.dtype):
        return f"the {name} backend keeps no KV cache in {options.kv_cache_dtype}; use auto"
    if (options.replicas or 1) > 1:
        return f"the {name} backend runs one replica and {options.replicas} are asked for; use 1"
    if size > gpu.gpus_per_host:
        return f"the {name} backend keeps to one host, of {gpu.gpus_per_host} GPUs; use no more"
    reason = arithmetic_refusal(shape, gpu, options)
    if not reason and options.backend in ("auto", "transformers"):
        reason = ranks_refusal(shape, options, "none", size)
    return reason


def _backend_refusal(shape: ModelShape, options: Options) -> str:
    """Why the options keep the model from the one backend that runs it."""
    if not needs_transformers(shape, options):
        return ""
    if options.backend == "paged":
        kind = shape.stored_quantization or f"model_type {shape.family}"
        return f"the paged backend does not run {kind}; use engine.backend transformers"
    if options.kv_cache_dtype not in ("auto", options.dtype):
        return f"the transformers backend keeps no KV cache in {options.kv_cache_dtype}; use auto"
    return ""


def _layers_refusal(shape: ModelShape, size: int) -> str:
    """Why ranks cannot share a model of this kind."""
    if not shape.is_paged:
        return f"model_type {shape.family} needs the transformers backend, which runs on one GPU"
    if shape.num_expert_params and shape.family not in EXPERT_MODEL_TYPES:
        return f"ranks cannot share the experts of model_type {shape.family}"
    if shape.expert_size % size:
        return f"tensor parallel {size} does not divide the experts' intermediate size {shape.expert_size}"
    if shape.family in UNCUT_MODEL_TYPES:
        return f"ranks cannot share the layers of model_type {shape.family}"
    return ""
