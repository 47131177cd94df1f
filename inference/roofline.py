"""Roofline: how long a replica takes for a workload, from sizes and data sheets alone.

One step costs its matrix products (bound by arithmetic or by reading the weights), the KV cache it
reads, prefill attention, element-wise traffic, all-reduces, and a fixed overhead; kernels do not
overlap. Where the host launches them one by one, it may take longer than the device does. A run
(`inference.prediction`) is then one kind of step, where the engine spreads its load evenly, or
static batches, or else three phases, solved in closed form over classes of equal sequences:

    prefill first    only when everything fits at once
    steady           the batch stays full; prefill chunks ride along with decoding
    drain            no sequence is waiting; the batch shrinks as sequences end

    B running sequences   T tokens in a step   S mean context   L completion length
"""

import math
from dataclasses import dataclass

from inference.hardware import LINK_EFFICIENCY, GpuType
from inference.model_shape import DTYPE_BYTES, ModelShape

# Fixed costs of the engine and shares of traffic left after fusing, to be fitted from measured runs.
STEP_OVERHEAD_S = 0.3e-3
ELEMENTWISE_SHARE = 0.6
PREFILL_ATTENTION_SHARE = 0.5
KV_BANDWIDTH_SHARE = 0.93
KV_BANDWIDTH_SHARE_FP8 = 0.83  # converting them costs time
EXPERT_BANDWIDTH_SHARE_FP8 = (
    0.65  # with what surrounds them: 30B-A3B on one H100, 235B-A22B on four
)
ALL_REDUCE_LATENCY_S = {"nvlink": 12e-6, "xgmi": 15e-6, "pcie": 30e-6, "network": 60e-6}
SUM_SURROUNDINGS_S = 16e-6
"""What each sum over ranks costs around it, narrower products and waiting: 32B and 8B over two H200s, 32B over two H100s."""

# From here on: engine_h100_202611.md, the section on int8, nf4 and the transformers backend.
UNFUSED_LAYER_S = 150e-6
"""What a layer as its class computes it, some sixty kernels in a graph, costs beside a fused one."""

UNFUSED_MOVES = 56
"""Elements it reads and writes more for each of a token's hidden values: fitted, like the constant above."""

DEQUANTIZE_BANDWIDTH_SHARE = 0.74
"""Of nf4 weights written out in 16 bits."""

INT8_LAYER_S = 3.9e-3
"""A layer whose int8 products look at values on the host, which launches it anew at every step."""

STATIC_LAYER_S = {"none": 3.43e-3, "gptq": 3.17e-3, "nf4": 4.29e-3, "int8": 5.53e-3}
"""A layer as the transformers backend launches it, by what its weights are; on the hosts of the H100s."""

MAX_NUM_SEQS = 1024
PREFILL_CHUNK_TOKENS = 8192

# A batch of the transformers backend: rows, and prompt tokens with what they are padded with.
STATIC_NUM_SEQS = 128
STATIC_PASS_TOKENS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One engine as the roofline sees it: a model on `tensor_parallel_size` GPUs of one type."""

    shape: ModelShape
    gpu: GpuType
    tensor_parallel_size: int = 1
    dtype: str = "bfloat16"
    quantization: str = "none"
    kv_cache_dtype: str = "auto"
    max_num_seqs: int = MAX_NUM_SEQS
    backend: str = "paged"

    @property
    def bitsandbytes(self) -> str | None:
        """int8 or nf4 where bitsandbytes multiplies, also what is stored so; else None."""
        return self.shape.bitsandbytes(self.quantization)

    @property
    def weight_bytes_per_gpu(self) -> int:
        """Bytes of weights on each GPU."""
        return self.shape.weight_bytes_per_rank(
            self.tensor_parallel_size, self.dtype, self.quantization
        )

    @property
    def loading_bytes_per_gpu(self) -> int:
        """Most bytes of weights on each GPU while they are loaded."""
        return self.shape.loading_bytes_per_rank(
            self.tensor_parallel_size, self.dtype, self.quantization
        )

    @property
    def kv_bytes_per_token_per_gpu(self) -> float:
        """Bytes of KV cache one token takes on each GPU; the KV heads are split."""
        kv_dtype = self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
        return self.shape.kv_bytes_per_token(kv_dtype) / self.tensor_parallel_size

    @property
    def kv_tokens(self) -> int:
        """Tokens the KV cache holds beside the weights; negative when the weights do not fit."""
        room = self.gpu.usable_bytes - self.weight_bytes_per_gpu
        return math.floor(room / self.kv_bytes_per_token_per_gpu)

    @property
    def spans_hosts(self) -> bool:
        """Whether one replica needs more GPUs than a host has."""
        return self.tensor_parallel_size > self.gpu.gpus_per_host

    def step_s(
        self,
        num_decode: float,
        num_prefill: float,
        context: float,
        prompt: float,
        *,
        shared: float = 0.0,
    ) -> float:
        """Seconds of one step: `num_decode` sequences at mean `context`, plus prefill tokens.

        `prompt` is the mean prompt length: it sets the cost of prefill attention and how many
        prompts end in the step, each of which needs one row of logits. The first `shared` tokens of
        every prompt are the same: computed before, and read once for all sequences.
        """
        tokens = num_decode + num_prefill
        rows = num_decode + (num_prefill / (prompt - shared) if prompt > shared else 0.0)
        # A smooth maximum: near the ridge neither the units nor the memory are kept busy.
        gemm = math.hypot(self._gemm_flops_s(tokens, rows), self._weight_read_s(tokens))
        share = KV_BANDWIDTH_SHARE_FP8 if self.kv_cache_dtype == "fp8" else KV_BANDWIDTH_SHARE
        kv_bandwidth = self.gpu.achieved_bandwidth * share
        read = num_decode * (context - shared) + shared
        kv = read * self.kv_bytes_per_token_per_gpu / kv_bandwidth
        pairs = num_prefill * (shared + (prompt - shared) / 2) + num_decode * shared
        other = self._tile_attention_s(pairs) + self._elementwise_s(tokens, rows)
        device_s = gemm + kv + other + self._unfused_s(tokens) + self._dequantize_s()
        return self._launched_s(device_s + self._all_reduce_s(tokens) + STEP_OVERHEAD_S)

    def _launched_s(self, device_s: float) -> float:
        """Seconds of a step whose kernels are launched one by one where they are not replayed as a graph."""
        layers = self.shape.num_layers
        if self.backend == "transformers":
            kind = self.bitsandbytes or self.shape.stored_quantization
            return max(
                device_s, layers * STATIC_LAYER_S.get(kind or "none", STATIC_LAYER_S["none"])
            )
        if self.backend == "paged" and self.bitsandbytes == "int8":
            return device_s + layers * INT8_LAYER_S  # which waits for the device, layer by layer
        return device_s

    def _gemm_flops_s(self, tokens: float, rows: float) -> float:
        shape, gpu = self.shape, self.gpu
        layers = 2 * shape.num_active_params * tokens / gpu.achieved_flops(self._layer_dtype())
        head = 2 * shape.num_embedding_params * rows / gpu.achieved_flops(self.dtype)
        return (layers + head) / self.tensor_parallel_size

    def _layer_dtype(self) -> str:
        is_fp8 = self.quantization == "fp8" and "fp8" in self.gpu.flops
        return "fp8" if is_fp8 else self.dtype

    def _weight_read_s(self, tokens: float) -> float:
        shape, element = self.shape, DTYPE_BYTES[self.dtype]
        linear = shape.linear_bytes_per_param(self.dtype, self.quantization)
        if self.bitsandbytes == "nf4":
            linear = element  # as it was written out: see `_dequantize_s`
        expert = shape.expert_bytes_per_param(self.dtype, self.quantization)
        if self._layer_dtype() == "fp8":
            expert /= EXPERT_BANDWIDTH_SHARE_FP8
        read = (
            (shape.num_attention_params + shape.num_mlp_params) * linear
            + shape.num_expert_params * expert * self._expert_coverage(tokens)
            + shape.num_embedding_params * element
        )
        return read / self.tensor_parallel_size / self.gpu.achieved_bandwidth

    def _dequantize_s(self) -> float:
        """Of nf4 weights, which every call writes out in 16 bits first."""
        if self.bitsandbytes != "nf4":
            return 0.0
        shape, element = self.shape, DTYPE_BYTES[self.dtype]
        moved = shape.linear_bytes_per_param(self.dtype, self.quantization) + element
        params = (shape.num_attention_params + shape.num_mlp_params) / self.tensor_parallel_size
        return params * moved / self.gpu.achieved_bandwidth / DEQUANTIZE_BANDWIDTH_SHARE

    def _unfused_s(self, tokens: float) -> float:
        """Of layers that run as their class has them, with its own norms, rotations and activations."""
        shape = self.shape
        if self.backend != "paged" or (shape.is_fused and self.bitsandbytes != "int8"):
            return 0.0
        moved = UNFUSED_MOVES * DTYPE_BYTES[self.dtype] * tokens * shape.hidden_size
        return shape.num_layers * (UNFUSED_LAYER_S + moved / self.gpu.achieved_bandwidth)

    def _expert_coverage(self, tokens: float) -> float:
        """Share of the experts that at least one of `tokens` tokens is routed to."""
        if not self.shape.is_moe:
            return 0.0
        share = self.shape.num_experts_per_token / self.shape.num_experts
        return float(1 - (1 - share) ** tokens)

    def _tile_attention_s(self, pairs: float) -> float:
        """Of prefill, and of decoding over shared prefixes: so many pairs of a query and a key."""
        shape, gpu = self.shape, self.gpu
        width = shape.num_layers * shape.num_attention_heads * shape.head_dim
        flops = 4 * width * pairs
        rate = gpu.achieved_flops(self.dtype) * PREFILL_ATTENTION_SHARE
        return flops / self.tensor_parallel_size / rate

    def _elementwise_s(self, tokens: float, rows: float) -> float:
        shape, element = self.shape, DTYPE_BYTES[self.dtype]
        q = shape.num_attention_heads * shape.head_dim
        kv = shape.num_key_value_heads * shape.head_dim
        permute = 2 * shape.num_experts_per_token * shape.hidden_size
        split = (2 * q + 4 * kv + 3 * shape.intermediate_size + permute) / self.tensor_parallel_size
        a_token = element * shape.num_layers * (8 * shape.hidden_size + split) * ELEMENTWISE_SHARE
        logits = rows * shape.vocab_size * 2 * element / self.tensor_parallel_size
        return (tokens * a_token + logits) / self.gpu.achieved_bandwidth

    def _all_reduce_s(self, tokens: float) -> float:
        ranks = self.tensor_parallel_size
        if ranks == 1:
            return 0.0
        link = "network" if self.spans_hosts else self.gpu.link
        bandwidth = self.gpu.network_bandwidth if self.spans_hosts else self.gpu.link_bandwidth
        message = tokens * self.shape.hidden_size * DTYPE_BYTES[self.dtype]
        moved = message * 2 * (ranks - 1) / ranks
        latency = ALL_REDUCE_LATENCY_S.get(link, ALL_REDUCE_LATENCY_S["pcie"])
        calls = 2 * self.shape.num_layers
        return calls * (latency + SUM_SURROUNDINGS_S + moved / (bandwidth * LINK_EFFICIENCY))
