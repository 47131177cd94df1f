"""Models as the paged engine runs them: packed tokens in, hidden states out, attention over the paged cache.

PagedModel        any transformers class, unmodified: its attention is replaced through AttentionInterface
FusedModel        the Llama family's decoder layer written on our fused operations, with the same weights

Under tensor parallel the weights are this rank's partitions (`inference.partition`): N, K and C count what is here.

T tokens   D hidden size   R rows   C columns of the vocabulary   N query heads   K KV heads   H head dim
"""

from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from inference.attention_interface import (
    ATTENTION_NAME,
    Reference,
    refuse_what_does_not_fit,
    register,
)
from inference.batch import Batch
from inference.errors import EngineConfigError
from inference.families import EXPERT_MODEL_TYPES, FUSED_MODEL_TYPES, FUSED_ROPE_TYPES
from inference.family_check import refuse_by_config
from inference.kernels import plain
from inference.kv_cache import KVCache, KVShape
from inference.layers import FusedLayer, can_be_fused, take_layer
from inference.linears import Linear, quantised
from inference.quantization import is_bitsandbytes, looks_at_values
from inference.tensor_parallel import TensorParallel
from inference.vocabulary import PartitionedVocabulary, WholeVocabulary, columns_of


class PagedModel:
    """An unmodified transformers model whose attention reads and writes a KVCache."""

    def __init__(
        self, model: Any, ops: ModuleType = plain, *, ranks: TensorParallel | None = None
    ) -> None:
        self.ranks = ranks or TensorParallel.alone()
        self.config = model.config.get_text_config()
        refuse_by_config({**vars(self.config), "model_type": self.config.model_type})
        if not getattr(self.config, "num_attention_heads", 0):
            raise EngineConfigError(
                f"engine.backend is paged: {self.config.model_type} has no attention heads; use transformers"
            )
        self._model = model
        self._ops = ops
        self.can_be_captured = not looks_at_values(model)
        """Whether a step may be replayed as a CUDA graph."""

        self.num_weight_bytes = sum(p.nbytes for p in model.parameters())
        """Of what this rank holds of the model."""

        self._cache: KVCache | None = None
        self._batch: Batch | None = None
        self._num_attended = 0
        self._embedding: Tensor = model.get_input_embeddings().weight
        self.vocabulary = WholeVocabulary(self._embedding.shape[0])
        self._head = Linear(*self._take_head(model.get_output_embeddings()))
        self.num_heads: int = self.config.num_attention_heads // self.ranks.size
        self._take_over_attention(model)

    def _take_over_attention(self, model: Any) -> None:
        """Have the model's attention modules call `attend`."""
        register()
        model.set_attn_implementation(ATTENTION_NAME)
        if self.config._attn_implementation != ATTENTION_NAME:
            raise EngineConfigError(
                f"engine.backend is paged: {self.config.model_type} does not use transformers' "
                f"attention interface; use transformers"
            )
        refuse_what_does_not_fit(model, self.config)
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.nightjar_model = Reference(self)

    def _take_head(self, head: Any) -> tuple[Tensor, Tensor | None]:
        """Return this rank's rows of the output head, without a copy."""
        weight, bias = head.weight, getattr(head, "bias", None)
        if not weight.is_floating_point():
            raise EngineConfigError(
                "engine.backend is paged: the model has its output head quantised; use transformers"
            )
        size, ranks = self.vocabulary.size, self.ranks
        if ranks.size == 1:
            return weight, bias
        self.vocabulary = PartitionedVocabulary(size, ranks)
        if weight.shape[0] < size:  # read as a partition; tied to the embedding it is whole
            return weight, bias
        here = slice(*columns_of(size, ranks.rank, ranks.size))
        return weight[here], None if bias is None else bias[here]

    @property
    def uses_kernels(self) -> bool:
        """Whether attention runs on Triton kernels, which take their work cut into pieces."""
        return self._ops is not plain

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Element type of hidden states."""
        return self._embedding.dtype

    @property
    def hidden_size(self) -> int:
        """D."""
        return self._embedding.shape[1]

    @property
    def has_windows(self) -> bool:
        """Whether some layer attends to the last tokens only."""
        return bool(getattr(self.config, "sliding_window", None))

    def kv_shape(self, block_size: int, dtype: torch.dtype | None = None) -> KVShape:
        """Return what this model caches per token."""
        config = self.config
        num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if getattr(config, "multi_query", False):  # GPTBigCode, which has no other word for it
            num_kv_heads = 1
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        return KVShape(
            num_layers=config.num_hidden_layers,
            num_kv_heads=num_kv_heads // self.ranks.size,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype or self.dtype,
        )

    def attach(self, cache: KVCache, max_model_len: int) -> None:
        """Use this cache from now on, for positions below `max_model_len`."""
        self._cache = cache

    def detach(self) -> None:
        """Let go of the cache, so that another may take its memory."""
        self._cache = None

    def hidden(self, batch: Batch, last_token: Tensor) -> Tensor:
        """Return the final hidden states [T,D] of a batch, storing its keys and values."""
        self._batch, self._num_attended = batch, 0
        output = self._model.base_model(
            # Not their embeddings: an embedding module may do more than look up, such as scale.
            input_ids=self._ops.token_ids(batch, last_token)[None],
            position_ids=batch.positions.long()[None],
            use_cache=False,
        )
        if self._num_attended != self.config.num_hidden_layers:
            raise EngineConfigError(
                f"engine.backend is paged: {self.config.model_type} attends {self._num_attended} times "
                f"in {self.config.num_hidden_layers} layers; use transformers"
            )
        return cast(Tensor, output.last_hidden_state[0])

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Return the logits [R,C] of hidden states."""
        return self._head(hidden_RD)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int
    ) -> Tensor:
        """Store k and v [1,K,T,H] and attend with q [1,N,T,H]; return [1,T,N,H]."""
        assert self._cache is not None, "attach a cache first"
        assert self._batch is not None, "attention outside `hidden`"
        self._num_attended += 1
        k_cache, v_cache = self._cache.layer(layer)
        q_TNH, k_TKH, v_TKH = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        self._ops.store(k_TKH, v_TKH, self._batch, k_cache, v_cache)
        out: Tensor = self._ops.attention(
            q_TNH, k_cache, v_cache, self._batch, scale=scale, window=window
        )
        return out[None]


class FusedModel(PagedModel):
    """The same weights run by fused layers; takes the transformers model apart."""

    def __init__(
        self,
        model: Any,
        ops: ModuleType = plain,
        *,
        is_fp8: bool = False,
        ranks: TensorParallel | None = None,
        layers: list[FusedLayer] | None = None,
    ) -> None:
        """`layers`: the model's, where they were taken from it while it was read (`inference.quantised_loading`)."""
        super().__init__(model, ops, ranks=ranks)
        base = model.base_model
        self._rotary = base.rotary_emb
        self._eps: float = base.norm.variance_epsilon
        self._norm: Tensor = base.norm.weight
        self._cos = self._sin = torch.empty(0)
        self._is_fp8 = is_fp8
        self._layers = layers or [
            take_layer(model, index, ops, is_fp8, self.ranks) for index in range(len(base.layers))
        ]
        if is_fp8:
            self._head = quantised(*self._take_head(model.get_output_embeddings()))
            layer_bytes = sum(layer.num_bytes for layer in self._layers)
            self.num_weight_bytes = self._embedding.nbytes + layer_bytes + self._head.num_bytes
        self._model = None if is_fp8 else model

    def _take_over_attention(self, model: Any) -> None:
        """Nothing to do: fused layers take the place of the modules that would call."""

    @property
    def has_windows(self) -> bool:
        """Whether some layer attends to the last tokens only."""
        return any(layer.window for layer in self._layers)

    def attach(self, cache: KVCache, max_model_len: int) -> None:
        """Use this cache from now on, for positions below `max_model_len`."""
        super().attach(cache, max_model_len)
        like = torch.zeros(1, dtype=torch.float32, device=self.device)
        positions = torch.arange(max_model_len, device=self.device)[None]
        cos, sin = self._rotary(like, positions)
        half = cos.shape[-1] // 2
        self._cos, self._sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def hidden(self, batch: Batch, last_token: Tensor) -> Tensor:
        """Return the final hidden states [T,D] of a batch, storing its keys and values."""
        assert self._cache is not None, "attach a cache first"
        residual_TD: Tensor = self._ops.embed(batch, last_token, self._embedding)
        x = self._layers[0].first_norm(residual_TD)
        for layer, following in zip(self._layers, [*self._layers[1:], None], strict=True):
            cache = self._cache.layer(layer.index)
            out_TD = layer.forward(x, residual_TD, batch, self._cos, self._sin, cache)
            if following is not None:
                x = following.next_norm(out_TD, residual_TD)
            else:
                x = self._ops.add_rms_norm(out_TD, residual_TD, self._norm, self._eps)
        return cast(Tensor, x)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Return the logits [R,C] of hidden states."""
        return self._head(self._ops.quantise_rows(hidden_RD) if self._is_fp8 else hidden_RD)


def make_paged_model(
    model: Any,
    ops: ModuleType = plain,
    *,
    is_fp8: bool = False,
    ranks: TensorParallel | None = None,
) -> PagedModel:
    """Return the fastest form in which this engine can run a transformers model.

    Raises:
        EngineConfigError: the model needs what the paged backend does not have.
    """
    if is_fp8:
        check_fp8_layers(model)
    if _has_fused_layers(model):
        return FusedModel(model, ops, is_fp8=is_fp8, ranks=ranks)
    return PagedModel(model, ops, ranks=ranks)


def check_fp8_layers(model: Any) -> None:
    """Refuse a model, of which no weight need be there, whose layers cannot run in e4m3. Raises EngineConfigError."""
    if not _has_fused_layers(model):
        kind = model.config.get_text_config().model_type
        raise EngineConfigError(
            f"model.quantization is fp8: not available for model_type {kind}; use none"
        )


def _has_fused_layers(model: Any) -> bool:
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FUSED_MODEL_TYPES
        and getattr(config, "hidden_act", "") == "silu"
        and rope.get("rope_type", "") in FUSED_ROPE_TYPES
        and rope.get("partial_rotary_factor", 1.0) in (None, 1.0)
        and (not is_bitsandbytes(model) or _are_in_four_bits(model, config))
    )


def _are_in_four_bits(model: Any, config: Any) -> bool:
    """Whether what bitsandbytes made of the layers' weights are numbers that can be laid side by side."""
    if config.model_type in EXPERT_MODEL_TYPES or looks_at_values(model):
        return False
    dtype = model.get_input_embeddings().weight.dtype
    return all(can_be_fused(layer, dtype) for layer in model.base_model.layers)
