"""The paged engine gives the tokens of the plain model, whatever the batch, the chunks and the memory."""

import pytest
import torch
import transformers

from inference.build_engine import build_engine
from inference.errors import EngineConfigError, OutOfMemory
from inference.model import FusedModel, PagedModel, make_paged_model
from inference.sampling import SamplingParams
from inference.sequence import Completion
from tests.paged_cases import (
    COMMON,
    CONFIGS,
    UNMODIFIED,
    VOCAB,
    expect_too_little,
    make_endless_row,
    make_row,
    model_of,
    prompts_of,
    reference,
    run,
    sequences_of,
    settings_of,
    tokens,
)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_gives_the_plain_models_tokens(family):
    plain_model = model_of(family)
    sequences = sequences_of(prompts_of(11))
    expected = reference(plain_model, sequences)
    paged = make_paged_model(model_of(family))
    assert isinstance(paged, FusedModel) == (family not in UNMODIFIED)
    completions, _ = run(paged, sequences, settings_of())
    assert tokens(completions) == expected
    assert {c.finish_reason for c in completions.values()} == {"length"}


@pytest.mark.parametrize("family", ["qwen3", "mistral-window", "qwen3-moe"])
def test_an_unmodified_model_class_gives_the_same_tokens(family):
    sequences = sequences_of(prompts_of(7))
    expected = reference(model_of(family), sequences)
    completions, _ = run(PagedModel(model_of(family)), sequences, settings_of())
    assert tokens(completions) == expected


@pytest.mark.parametrize(
    "config",
    [
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
        transformers.FalconConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
        ),
    ],
)
def test_a_model_with_attention_of_its_own_is_refused_by_name(config):
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(EngineConfigError, match=rf"{config.model_type} does not use .* interface"):
        make_paged_model(model)


NO_GROUPS = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.BertConfig(**NO_GROUPS, is_decoder=True), "bert has an output head of sev"),
        (
            transformers.MBartConfig(
                vocab_size=VOCAB,
                d_model=32,
                decoder_layers=2,
                decoder_attention_heads=4,
                decoder_ffn_dim=48,
                is_decoder=True,
                is_encoder_decoder=False,
            ),
            "mbart counts positions itself",
        ),
        (
            transformers.Gemma3TextConfig(**COMMON, head_dim=8, use_bidirectional_attention=True),
            "gemma3_text attends to later tokens",
        ),
    ],
)
def test_a_class_that_would_give_other_tokens_is_refused_by_name(config, words):
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(EngineConfigError, match=words):
        make_paged_model(model)


def test_attention_that_is_asked_twice_in_a_layer_is_refused():
    config = transformers.DiffLlamaConfig(**COMMON)
    model = make_paged_model(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(EngineConfigError, match="diffllama attends 4 times in 2 layers"):
        run(model, sequences_of(prompts_of(1)), settings_of())


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "config",
    [
        transformers.Phi3Config(**COMMON, rope_parameters=LONGROPE),
        transformers.LlamaConfig(**COMMON, rope_parameters=DYNAMIC),
        transformers.Gemma3TextConfig(
            **COMMON,
            head_dim=8,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": DYNAMIC,
            },
        ),
    ],
)
def test_rotary_frequencies_that_follow_the_longest_row_are_refused_by_name(config):
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(EngineConfigError, match=r"rope_type (longrope|dynamic), whose frequencies"):
        make_paged_model(model)


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
    expected = reference(model_of("qwen3"), sequences, end_token_ids=())
    model = FusedModel(model_of("qwen3"))
    engine, _, _ = build_engine(model, settings_of(max_num_blocks=30), make_endless_row)
    expect_too_little(engine.scheduler)
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


def run_out_of_memory(engine, at, error=torch.OutOfMemoryError):
    launch, calls = engine.runner.launch, []

    def launch_or_fail(step):
        calls.append(step.number)
        if len(calls) in at:
            raise error("CUDA error: out of memory")
        return launch(step)

    engine.runner.launch = launch_or_fail
    completions: dict[int, Completion] = {}
    while engine.num_unfinished:
        completions.update({c.seq_id: c for c in engine.step()})
        tables = [running.block_table for running in engine.scheduler.running]
        engine.scheduler.blocks.check_integrity(tables)
    return completions


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_running_out_of_memory_shrinks_the_steps_and_goes_on(error):
    sequences = sequences_of(prompts_of(10))
    expected = reference(model_of("qwen3"), sequences)
    engine, _, _ = build_engine(FusedModel(model_of("qwen3")), settings_of(), make_row)
    engine.submit(sequences)
    assert tokens(run_out_of_memory(engine, (3, 9), error)) == expected
    assert engine.scheduler.max_num_batched_tokens == 16


@pytest.mark.parametrize("at", range(1, 16))
def test_a_step_that_ran_out_of_memory_leaves_no_keys_behind_that_were_never_stored(at):
    sequences = sequences_of(prompts_of(9, shared=11))
    expected = reference(model_of("qwen3"), sequences)
    settings = settings_of(max_num_batched_tokens=24)
    engine, _, _ = build_engine(FusedModel(model_of("qwen3")), settings, make_row)
    engine.submit(sequences)
    assert tokens(run_out_of_memory(engine, (at,))) == expected


def test_where_fewer_tokens_do_not_help_fewer_sequences_run_and_none_is_lost():
    sequences = sequences_of(prompts_of(10))
    expected = reference(model_of("qwen3"), sequences)
    engine, _, _ = build_engine(FusedModel(model_of("qwen3")), settings_of(), make_row)
    launch = engine.runner.launch

    def launch_few(step):
        if len(step.sampled) > 2:
            raise torch.OutOfMemoryError("no memory left")
        return launch(step)

    engine.runner.launch = launch_few
    engine.submit(sequences)
    assert tokens(run_out_of_memory(engine, ())) == expected


def test_a_device_without_room_for_one_sequence_is_an_error():
    engine, _, _ = build_engine(FusedModel(model_of("qwen3")), settings_of(), make_row)
    engine.submit(sequences_of(prompts_of(4)))
    with pytest.raises(OutOfMemory, match="one sequence"):
        run_out_of_memory(engine, range(1, 1000))


def test_end_tokens_end_a_sequence_and_are_not_part_of_it():
    sequences = sequences_of(prompts_of(24), SamplingParams(max_tokens=10, temperature=1.2))
    expected = reference(model_of("qwen3"), sequences)
    completions, _ = run(FusedModel(model_of("qwen3")), sequences, settings_of())
    assert tokens(completions) == expected
    reasons = {c.finish_reason for c in completions.values()}
    assert reasons == {"stop", "length"}
    for completion in completions.values():
        assert (completion.finish_reason == "length") == (len(completion.token_ids) == 10)


def test_fp8_weights_keep_most_tokens_and_fp8_keys_and_values_all_lengths():
    sequences = sequences_of(prompts_of(12))
    expected = reference(model_of("qwen3"), sequences)
    model = FusedModel(model_of("qwen3"), is_fp8=True)
    completions, _ = run(model, sequences, settings_of(kv_dtype=torch.float8_e4m3fn))
    found = tokens(completions)
    assert {i: len(t) for i, t in found.items()} == {i: len(t) for i, t in expected.items()}
    firsts = [found[i][0] == expected[i][0] for i in expected]
    assert sum(firsts) >= 9, "first tokens, before differences add up"
