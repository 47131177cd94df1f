"""The paged engine gives the tokens of the plain model, whatever the batch, the chunks and the memory."""

from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
import transformers

from inference.backends.paged import PagedSettings, build_engine
from inference.backends.row import Row
from inference.model import FusedModel, PagedModel, make_paged_model
from inference.sampler import SamplerRow, sample
from inference.sampling import SamplingParams
from inference.sequence import Completion, Sequence

VOCAB = 97
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
}


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


def reference(model: Any, sequences: Seq[Sequence]) -> dict[int, tuple[int, ...]]:
    """One sequence at a time, the whole of it at every step."""
    found = {}
    with torch.inference_mode():
        for sequence in sequences:
            token_ids: list[int] = []
            while len(token_ids) < sequence.sampling.max_tokens:
                ids = torch.tensor([[*sequence.prompt_token_ids, *token_ids]])
                logits = model(input_ids=ids, use_cache=False).logits[0, -1:]
                row = SamplerRow(
                    sequence.sampling, sequence.draw_seed, sequence.prompt_token_ids, token_ids
                )
                token_ids.append(sample(logits, [row]).token_ids[0])
            found[sequence.seq_id] = tuple(token_ids)
    return found


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
    return Row(sequence, lambda ids: "", (), (), min(sequence.sampling.max_tokens, room))


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


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_gives_the_plain_models_tokens(family):
    plain_model = model_of(family)
    sequences = sequences_of(prompts_of(11))
    expected = reference(plain_model, sequences)
    paged = make_paged_model(model_of(family))
    assert isinstance(paged, FusedModel) == (family != "gpt-neox")
    completions, _ = run(paged, sequences, settings_of())
    assert tokens(completions) == expected
    assert {c.finish_reason for c in completions.values()} == {"length"}


@pytest.mark.parametrize("family", ["qwen3", "mistral-window", "qwen3-moe"])
def test_an_unmodified_model_class_gives_the_same_tokens(family):
    sequences = sequences_of(prompts_of(7))
    expected = reference(model_of(family), sequences)
    completions, _ = run(PagedModel(model_of(family)), sequences, settings_of())
    assert tokens(completions) == expected


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5, 16])
@pytest.mark.parametrize("max_num_batched_tokens", [16, 33, 256])
def test_batch_and_chunk_size_change_nothing(max_num_seqs, max_num_batched_tokens):
    sequences = sequences_of(prompts_of(13))
    expected = reference(model_of("qwen3"), sequences)
    completions, _ = run(
        FusedModel(model_of("qwen3")),
        sequences,
        settings_of(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
    )
    assert tokens(completions) == expected


@pytest.mark.parametrize("min_step_tokens", [1, 7, 24])
def test_an_even_load_changes_nothing(min_step_tokens):
    sequences = sequences_of(prompts_of(13))
    expected = reference(model_of("qwen3"), sequences)
    completions, _ = run(
        FusedModel(model_of("qwen3")), sequences, settings_of(min_step_tokens=min_step_tokens)
    )
    assert tokens(completions) == expected


def test_shared_prefixes_are_computed_once_and_change_nothing():
    sequences = sequences_of(prompts_of(12, shared=21))
    expected = reference(model_of("qwen3"), sequences)
    completions, engine = run(FusedModel(model_of("qwen3")), sequences, settings_of())
    assert tokens(completions) == expected
    assert engine.stats.num_cached_tokens == 11 * 20
    assert sorted(c.num_cached_tokens for c in completions.values()) == [0] + [20] * 11


def test_a_preempted_sequence_completes_with_the_same_tokens():
    sampling = SamplingParams(max_tokens=40, temperature=0.8)
    sequences = sequences_of(prompts_of(9), sampling)
    expected = reference(model_of("qwen3"), sequences)
    model = FusedModel(model_of("qwen3"))
    engine, _, _ = build_engine(model, settings_of(max_num_blocks=30), make_row)
    engine.scheduler.lengths.observe(1)  # expects far too little, so blocks run out
    engine.submit(sequences)
    completions: dict[int, Completion] = {}
    while engine.num_unfinished:
        completions.update({c.seq_id: c for c in engine.step()})
        tables = [running.block_table for running in engine.scheduler.running]
        engine.scheduler.blocks.check_integrity(tables)
    assert engine.scheduler.num_preemptions > 0
    assert tokens(completions) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.3},
        {"temperature": 0.5, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    ],
)
def test_draws_depend_on_the_row_and_not_on_the_batch(changes):
    sampling = SamplingParams(max_tokens=9, ignore_eos=True, **changes)
    sequences = sequences_of(prompts_of(6), sampling)
    expected = reference(model_of("qwen3"), sequences)
    completions, _ = run(FusedModel(model_of("qwen3")), sequences, settings_of(max_num_seqs=4))
    assert tokens(completions) == expected


def test_sequences_submitted_while_others_run_are_taken_in():
    sequences = sequences_of(prompts_of(10))
    expected = reference(model_of("qwen3"), sequences)
    engine, _, _ = build_engine(FusedModel(model_of("qwen3")), settings_of(), make_row)
    waiting = list(sequences)
    completions: dict[int, Completion] = {}
    while waiting or engine.num_unfinished:
        if waiting:
            engine.submit([waiting.pop()])
        completions.update({c.seq_id: c for c in engine.step()})
    assert tokens(completions) == expected


def test_running_out_of_memory_shrinks_the_steps_and_goes_on():
    sequences = sequences_of(prompts_of(10))
    expected = reference(model_of("qwen3"), sequences)
    engine, _, _ = build_engine(FusedModel(model_of("qwen3")), settings_of(), make_row)
    launch, calls = engine.runner.launch, []

    def fail_twice(step):
        calls.append(step.number)
        if len(calls) in (3, 9):
            raise torch.OutOfMemoryError("no memory left")
        return launch(step)

    engine.runner.launch = fail_twice
    engine.submit(sequences)
    completions: dict[int, Completion] = {}
    while engine.num_unfinished:
        completions.update({c.seq_id: c for c in engine.step()})
    assert tokens(completions) == expected
    assert engine.scheduler.max_num_batched_tokens == 16
