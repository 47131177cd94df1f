"""Golden: a real model, greedy, at several batch sizes, equals plain `generate` one row at a time.

NIGHTJAR_TEST_MODEL names a SmolLM2-135M-Instruct model folder (see `python -m inference.gguf`).
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference import LLM, SamplingParams

MODEL = os.environ.get("NIGHTJAR_TEST_MODEL", "")
MAX_TOKENS = 8
QUESTIONS = [
    "What is the capital of France?",
    "Name a colour.",
    "Write one sentence about the sea, its tides and the people who live from it.",
    "List three fruits.",
    "Translate 'good morning' to Spanish.",
    "How many days are there in a week?",
    "Say yes.",
    "Summarise in a few words: the train was late because snow had covered the rails near the bridge.",
]

pytestmark = pytest.mark.skipif(
    not Path(MODEL, "config.json").is_file(),
    reason="set NIGHTJAR_TEST_MODEL to a SmolLM2 model folder",
)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """32 prompts of many lengths: each question four times, with more and more history before it."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    conversations = [
        [{"role": "system", "content": "Answer briefly. " * times}, {"role": "user", "content": q}]
        for times in range(1, 5)
        for q in QUESTIONS
    ]
    return [
        tokenizer.encode(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )
        for messages in conversations
    ]


@pytest.fixture(scope="module")
def golden(prompts) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True)
    found = []
    for token_ids in prompts:
        given = torch.tensor([token_ids])
        whole = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
        )
        completion = whole[0, len(token_ids) :].tolist()
        found.append(completion[: completion.index(2)] if 2 in completion else completion)
    return found


def test_the_chat_template_and_the_end_token_are_those_of_the_model(prompts):
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    text = tokenizer.decode(prompts[0])
    assert text.startswith("<|im_start|>system\nAnswer briefly. <|im_end|>\n<|im_start|>user\nWhat")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_model_answers(golden):
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    assert "Paris" in tokenizer.decode(golden[0])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["transformers", "paged"])
@pytest.mark.parametrize(("max_num_seqs", "num_prompts"), [(1, 12), (7, 32), (32, 32)])
def test_greedy_equals_generate_one_row_at_a_time(
    prompts, golden, max_num_seqs, num_prompts, backend
):
    with LLM(MODEL, backend=backend, dtype="float32", max_num_seqs=max_num_seqs) as llm:
        found = llm.generate(prompts[:num_prompts], SamplingParams(max_tokens=MAX_TOKENS))
    assert [list(completion.token_ids) for completion in found] == golden[:num_prompts]
