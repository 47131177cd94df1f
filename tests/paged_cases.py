"""What tests of the paged engine share: tiny random models of every family, sequences, the plain answer."""

import dataclasses
from collections.abc import Sequence as Seq
from typing import Any

import torch
import transformers

from inference.backends.row import Row
from inference.build_engine import build_engine
from inference.model import PagedModel
from inference.paged_settings import PagedSettings
from inference.sampler import SamplerRow, sample
from inference.sampling import SamplingParams
from inference.scheduler import Scheduler
from inference.sequence import Completion, Sequence

VOCAB = 97
END_TOKEN_IDS = (3, 7, 11, 20, 30, 41, 55, 56, 57, 58)
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=8),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "llama": lambda: transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "llama3-rope": lambda: transformers.LlamaConfig(
        **COMMON,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral-window": lambda: transformers.MistralConfig(**COMMON, head_dim=8, sliding_window=12),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
    ),
    "gemma": lambda: transformers.GemmaConfig(**COMMON, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON,
        head_dim=8,
        query_pre_attn_scalar=20,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
UNMODIFIED = ("gpt-neox", "gemma", "gemma3")
"""Families of `CONFIGS` that `make_paged_model` leaves as they are."""


def model_of(family: str) -> Any:
    torch.manual_seed(sum(map(ord, family)))
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def prompts_of(count: int, *, shared: int = 0, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(0, VOCAB, (n,), generator=generator).tolist()

    prefix = ids(shared)
    return [prefix + ids(1 + (7 * i) % 23) for i in range(count)]


def sequences_of(
    prompts: Seq[Seq[int]], sampling: SamplingParams | None = None, max_tokens: int = 12
) -> list[Sequence]:
    return [
        Sequence(
            i,
            prompt,
            sampling or SamplingParams(max_tokens=1 + (max_tokens + 5 * i) % 17, ignore_eos=True),
            draw_seed=1000 + i,
        )
        for i, prompt in enumerate(prompts)
    ]


def reference(
    model: Any, sequences: Seq[Sequence], end_token_ids: Seq[int] = END_TOKEN_IDS
) -> dict[int, tuple[int, ...]]:
    """One sequence at a time, the whole of it at every step."""
    found = {}
    with torch.inference_mode():
        for sequence in sequences:
            token_ids: list[int] = []
            end_ids = () if sequence.sampling.ignore_eos else end_token_ids
            while len(token_ids) < sequence.sampling.max_tokens:
                ids = torch.tensor([[*sequence.prompt_token_ids, *token_ids]], device=model.device)
                logits = model(input_ids=ids, use_cache=False).logits[0, -1:]
                row = SamplerRow(
                    sequence.sampling, sequence.draw_seed, sequence.prompt_token_ids, token_ids
                )
                token_id = sample(logits, [row]).token_ids[0]
                if token_id in end_ids:
                    break
                token_ids.append(token_id)
            found[sequence.seq_id] = tuple(token_ids)
    return found


def expect_too_little(scheduler: Scheduler) -> None:
    """Have completions foreseen far too short, so that blocks run out."""
    for _ in range(1000):
        scheduler.lengths.observe(1)


def settings_of(**changes: Any) -> PagedSettings:
    values: dict[str, Any] = {
        "max_model_len": 100,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "min_step_tokens": None,
        "kv_dtype": torch.float32,
    }
    return PagedSettings(**{**values, **changes})


def make_row(sequence: Sequence) -> Row:
    room = 100 - len(sequence.prompt_token_ids)
    return Row(sequence, lambda ids: "", END_TOKEN_IDS, (), min(sequence.sampling.max_tokens, room))


def run(model: PagedModel, sequences: Seq[Sequence], settings: PagedSettings) -> Any:
    """Return the completions by seq_id and the engine; blocks are checked at every step."""
    engine, _, _ = build_engine(model, settings, make_row)
    engine.submit(sequences)
    completions: dict[int, Completion] = {}
    for _ in range(5000):
        for completion in engine.step():
            assert completion.seq_id not in completions
            completions[completion.seq_id] = completion
        tables = [running.block_table for running in engine.scheduler.running]
        engine.scheduler.blocks.check_integrity(tables)
        if not engine.num_unfinished:
            break
    assert len(completions) == len(sequences)
    return completions, engine


def tokens(completions: dict[int, Completion]) -> dict[int, tuple[int, ...]]:
    return {seq_id: completion.token_ids for seq_id, completion in completions.items()}


def make_endless_row(sequence: Sequence) -> Row:
    """A row that no token ends, though the scheduler cannot know that."""
    return dataclasses.replace(make_row(sequence), end_token_ids=())
