"""PagedSettings: the sizes of one paged engine, with every `auto` of a config resolved for a model on its device."""

from dataclasses import dataclass, replace

import torch

from inference.config import EngineConfig
from inference.errors import EngineConfigError
from inference.model import PagedModel
from inference.sampling_needs import GREEDY, SamplingNeeds

FEWER_BATCHED_TOKENS = 2048
"""Enough for products of a large model to run at their full rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedSettings:
    """Sizes of one paged engine; `auto` of the config resolved."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    min_step_tokens: int | None
    """See `Scheduler`."""

    kv_dtype: torch.dtype
    may_shorten: bool = False
    """Whether max_model_len may be lowered to what the cache holds; else that is an error."""

    fewer_batched_tokens: int | None = None
    """Taken instead of max_num_batched_tokens where the KV cache would miss what larger steps need."""

    max_num_blocks: int | None = None
    use_graphs: bool = True
    spare_bytes: int = 0
    needs: SamplingNeeds = GREEDY
    """What is sampled from the start."""

    @classmethod
    def of(cls, config: EngineConfig, model: PagedModel) -> "PagedSettings":
        """Resolve a config for a model on its device.

        Raises:
            EngineConfigError: max_model_len exceeds what the model handles.
        """
        is_cuda = model.device.type != "cpu"  # meta stands for a CUDA device: see `run_all`
        max_num_seqs = _resolve(config.max_num_seqs, 1024 if is_cuda else 64)
        most = max(_resolve(config.max_num_batched_tokens, 8192 if is_cuda else 2048), max_num_seqs)
        fewer = max(FEWER_BATCHED_TOKENS, max_num_seqs)
        may_shrink = is_cuda and config.max_num_batched_tokens == "auto" and fewer < most
        return cls(
            max_model_len=_max_model_len(model, config),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=most,
            block_size=64 if is_cuda else 16,
            min_step_tokens=_min_step_tokens(model) if is_cuda else None,
            kv_dtype=_kv_dtype(config, model),
            fewer_batched_tokens=fewer if may_shrink else None,
            may_shorten=config.max_model_len == "auto",
            use_graphs=not config.enforce_eager and model.can_be_captured,
            spare_bytes=config.spare_bytes,
            needs=config.sampling_needs,
        )

    def smaller_steps(self) -> "PagedSettings | None":
        """Return what needs less memory a step; None: it is one token of one sequence.

        First `fewer_batched_tokens`, then half as many tokens; where they would not do for one of every sequence, half
        as many sequences.
        """
        num_seqs, limit = self.max_num_seqs, self.max_num_batched_tokens
        tokens = self.fewer_batched_tokens
        if tokens is None:
            if limit <= num_seqs:
                num_seqs //= 2
            tokens = max(num_seqs, limit // 2)
        if not num_seqs:
            return None
        return replace(
            self,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=tokens,
            fewer_batched_tokens=None,
        )


def _min_step_tokens(model: PagedModel) -> int:
    """Return the tokens below which a step costs about the same, because it reads all weights in any case.

    256 by measurement for dense models. An expert sees only its share of the tokens: 64 each, by simulation (1,024
    chat rows on Qwen3-30B-A3B: 26.2 s at 256 tokens, 23.6 at 1,024, 23.8 at 4,096).
    """
    return max(256, 64 * expert_share(model))


def expert_share(model: PagedModel) -> int:
    """Return the tokens of which an expert sees one on average; 1 without experts."""
    num_experts = int(getattr(model.config, "num_experts", 0) or 0)
    per_token = int(getattr(model.config, "num_experts_per_tok", 0) or 0)
    return max(1, num_experts // per_token) if num_experts and per_token else 1


def _max_model_len(model: PagedModel, config: EngineConfig) -> int:
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    if config.max_model_len == "auto":
        if not limit:
            raise EngineConfigError(
                f"{config.model}: config.json names no longest length; set engine.max_model_len"
            )
        return limit
    if limit and config.max_model_len > limit:
        raise EngineConfigError(
            f"engine.max_model_len is {config.max_model_len}, but the model handles {limit} tokens; "
            f"lower it"
        )
    return config.max_model_len


def _kv_dtype(config: EngineConfig, model: PagedModel) -> torch.dtype:
    name = config.kv_cache_dtype
    if name == "auto":
        return model.dtype
    if name == "fp8":
        return torch.float8_e4m3fn
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _resolve(value: int | str, default: int) -> int:
    return default if isinstance(value, str) else value
