"""ModelShape: the sizes of a model, and the bytes its weights and KV cache take.

`inference.model_config` reads one from a config.json.
"""

from dataclasses import dataclass

from inference.tier import BITSANDBYTES

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0}

# int8 keeps one scale a row; nf4 one fp32 scale for 64 weights; fp8 one scale a row or 128x128 block.
QUANTIZED_BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}

MAX_AHEAD_BYTES = 2 << 30
"""Most bytes of tensors that are loaded before the caller has taken those in front of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that decide memory and speed. Parameter counts are for the whole model."""

    family: str
    """`model_type` of the config, for example `qwen3_moe`."""

    dtype: str
    """Element type of the stored weights: bfloat16, float16 or float32."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    max_model_len: int

    num_attention_params: int
    """Projections of all layers, biases included; quantisation shrinks them."""

    num_mlp_params: int
    """Dense feed-forward and shared-expert matrices of all layers; quantisation shrinks them."""

    num_expert_params: int
    """Routed expert matrices of all layers; 0 for a dense model."""

    num_other_params: int
    """Norms and routers: never quantised, never sharded."""

    intermediate_size: int
    """Feed-forward width one token passes through in one layer, all its experts together."""

    num_experts: int = 0
    num_experts_per_token: int = 0
    expert_size: int = 0
    """Feed-forward width of one expert."""

    sliding_window: int | None = None
    """Tokens some layers look back; KV is still counted as if every layer looked back over all."""

    is_paged: bool = True
    """Whether the paged backend can run it; the transformers backend runs what is left."""

    is_fused: bool = True
    """Whether the paged backend has its layers in fused operations, which fp8 needs."""

    stored_quantization: str | None = None
    """`quant_method` of a checkpoint that is quantised already, else None."""

    stored_bits: float | None = None
    """Bits a stored weight of that checkpoint takes, scales included."""

    @property
    def num_embedding_params(self) -> int:
        """One vocabulary matrix; an untied model holds two."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """Every distinct parameter; a tied matrix counts once."""
        embeddings = self.num_embedding_params * (1 if self.tied_embeddings else 2)
        return (
            embeddings
            + self.num_attention_params
            + self.num_mlp_params
            + self.num_expert_params
            + self.num_other_params
        )

    @property
    def num_active_params(self) -> int:
        """Layer parameters one token is multiplied with: the embeddings are left out."""
        share = self.num_experts_per_token / self.num_experts if self.num_experts else 0
        experts = round(self.num_expert_params * share)
        return self.num_attention_params + self.num_mlp_params + experts + self.num_other_params

    @property
    def is_moe(self) -> bool:
        """Whether any layer routes tokens to experts."""
        return self.num_experts > 0

    def kv_bytes_per_token(self, kv_cache_dtype: str = "auto") -> int:
        """Bytes one token's keys and values take over all layers; `auto` is the model's dtype."""
        name = self.dtype if kv_cache_dtype == "auto" else kv_cache_dtype
        element = DTYPE_BYTES[name]
        return int(2 * self.num_layers * self.num_key_value_heads * self.head_dim * element)

    def bitsandbytes(self, quantization: str) -> str | None:
        """int8 or nf4 where the weights are stored so or quantised so when they are loaded."""
        if quantization in BITSANDBYTES:
            return quantization
        if self.stored_quantization != "bitsandbytes" or self.stored_bits is None:
            return None
        return "nf4" if self.stored_bits < 8 else "int8"

    def linear_bytes_per_param(self, dtype: str, quantization: str) -> float:
        """Bytes of one attention or feed-forward weight."""
        # Blocks of fp8 are made full precision again when they are loaded.
        is_kept = self.stored_bits is not None and self.stored_quantization != "fp8"
        if self.stored_bits is not None and is_kept and quantization == "none":
            return self.stored_bits / 8
        return QUANTIZED_BYTES.get(quantization, DTYPE_BYTES[dtype])

    def expert_bytes_per_param(self, dtype: str, quantization: str) -> float:
        """Bytes of one expert weight; bitsandbytes cannot shrink them (they are 3-D parameters)."""
        if quantization in BITSANDBYTES:
            return DTYPE_BYTES[dtype]
        return self.linear_bytes_per_param(dtype, quantization)

    def weight_bytes(self, dtype: str = "auto", quantization: str = "none") -> int:
        """Bytes the loaded weights take on one device; embeddings and head are never quantised."""
        dtype = self.dtype if dtype == "auto" else dtype
        linear = self.num_attention_params + self.num_mlp_params
        whole = self.num_params - linear - self.num_expert_params
        return int(
            linear * self.linear_bytes_per_param(dtype, quantization)
            + self.num_expert_params * self.expert_bytes_per_param(dtype, quantization)
            + whole * DTYPE_BYTES[dtype]
        )

    def weight_bytes_per_rank(
        self, tensor_parallel_size: int, dtype: str = "auto", quantization: str = "none"
    ) -> int:
        """Bytes on one of `tensor_parallel_size` ranks: layers and head are split, the rest is whole.

        The embedding stays whole on every rank, and a tied head becomes a slice of its own.
        """
        if tensor_parallel_size == 1:
            return self.weight_bytes(dtype, quantization)
        dtype = self.dtype if dtype == "auto" else dtype
        element = DTYPE_BYTES[dtype]
        embedding = self.num_embedding_params * element
        total = self.weight_bytes(dtype, quantization)
        heads = 1 if self.tied_embeddings else 2
        layers = total - heads * embedding - self.num_other_params * element
        split = (layers + embedding) / tensor_parallel_size
        return int(split + embedding + self.num_other_params * element)

    def loading_bytes_per_rank(
        self, tensor_parallel_size: int, dtype: str = "auto", quantization: str = "none"
    ) -> int:
        """Most bytes of weights on one rank while they are loaded.

        To fp8 they are quantised layer by layer: in full precision are two layers, and what the readers are ahead.
        """
        dtype = self.dtype if dtype == "auto" else dtype
        loaded = self.weight_bytes_per_rank(tensor_parallel_size, dtype, quantization)
        if quantization != "fp8":
            return loaded
        params = self.num_attention_params + self.num_mlp_params + self.num_expert_params
        layers = params * DTYPE_BYTES[dtype] / tensor_parallel_size
        return loaded + int(min(layers, 2 * layers / self.num_layers + MAX_AHEAD_BYTES))
