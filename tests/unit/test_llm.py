"""LLM: the engine in a notebook."""

import gc
import json
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from inference import LLM, SamplingParams
from inference.backends.dummy import DummyBackend
from inference.errors import EngineConfigError, ModelError
from inference.sampling import draw_seed
from inference.sequence import Sequence

MODELS = Path(__file__).parents[1] / "data" / "models"
VOCAB_SIZE = json.loads((MODELS / "chain-a" / "config.json").read_text())["vocab_size"]


@pytest.fixture(scope="module")
def llm():
    with LLM(str(MODELS / "chain-a"), backend="transformers", max_num_seqs=3) as llm:
        yield llm


def test_one_text_gives_one_completion(llm):
    assert [c.text for c in llm.generate("Say 6")] == ["six"]


def test_completions_come_in_the_prompts_order(llm):
    texts = [c.text for c in llm.generate(["a 8", "a longer prompt 6", "b 7", "c 0", "d 6"])]
    assert texts == ["eight nine", "six", "seven", "zero", "six"]


def test_token_ids_are_prompts_too(llm):
    token_ids = llm.tokenizer.encode("Say 7")
    assert llm.generate([token_ids])[0].text == "seven"


def test_chat_takes_one_conversation_or_many(llm):
    ask = [[{"role": "user", "content": f"x {digit}"}] for digit in (6, 7)]
    assert [c.text for c in llm.chat(ask)] == ["six", "seven"]
    assert [c.text for c in llm.chat(ask[1])] == ["seven"]


def test_each_prompt_may_have_its_own_sampling(llm):
    params = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=5)]
    assert [c.text for c in llm.generate(["a 8", "b 8"], params)] == ["eight", "eight nine"]
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], params[:1])


def test_a_prompt_that_cannot_run_is_an_error_and_the_others_go_on(llm):
    found = llm.generate([[], llm.tokenizer.encode("b 6"), [5] * 999])
    assert [c.finish_reason for c in found] == ["error", "stop", "error"]
    assert "empty" in str(found[0].error)
    assert "999" in str(found[2].error)


def test_samples_of_a_prompt_are_drawn_apart_and_the_same_every_time():
    with LLM(str(MODELS / "tiny-a"), backend="transformers") as llm:
        params = SamplingParams(n=4, temperature=1.5, max_tokens=12, seed=5)
        found = llm.generate(["one", "one"], params)
        assert len(found) == 8
        assert len({c.token_ids for c in found}) == 8
        assert found == llm.generate(["one", "one"], params)
        token_ids = llm.tokenizer.encode("one")
        llm.backend.submit([Sequence(99, token_ids, params, draw_seed(5, 1, 2))])
        while llm.backend.num_unfinished:
            alone = llm.backend.step()
        assert alone[0].token_ids == found[6].token_ids


def test_a_model_without_chat_template_says_so():
    with (
        LLM(str(MODELS / "tiny-a-nochat"), backend="transformers") as llm,
        pytest.raises(ValueError, match="no chat template"),
    ):
        llm.chat([{"role": "user", "content": "hi"}])


def test_the_dummy_chats_without_a_model_folder():
    with LLM("", backend="dummy") as llm:
        (completion,) = llm.chat([{"role": "user", "content": "hi"}])
    assert completion.finish_reason in ("stop", "length")


def test_an_unknown_engine_setting_is_refused():
    with pytest.raises(TypeError, match="max_num_seq"):
        LLM("", backend="dummy", max_num_seq=3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "float8"),
        ("backend", "vllm"),
        ("quantization", "int2"),
        ("kv_cache_dtype", "int8"),
        ("offload", "disk"),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", "8"),
        ("max_model_len", -1),
        ("tensor_parallel_size", 0),
    ],
)
def test_an_engine_setting_that_cannot_be_is_refused_by_name_and_value(field, value):
    with pytest.raises(EngineConfigError, match=f"engine.{field} .*{re.escape(repr(value))}"):
        LLM("", **{"backend": "dummy", field: value})


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "hf://Qwen/Qwen3-8B"])
def test_a_model_of_the_hub_is_refused_with_what_brings_it(model):
    with pytest.raises(ModelError, match=rf"^{model}: no such .* `nightjar stage hf://"):
        LLM(model)


def test_a_model_that_is_no_path_is_refused():
    with pytest.raises(TypeError, match="give the path of a model folder"):
        LLM(None)


@pytest.mark.parametrize("prompts", [None, 7, [1, 2, 3], [None], b"text", [b"text"], {"a": 1}])
def test_prompts_of_another_kind_are_refused_with_what_to_give(llm, prompts):
    with pytest.raises(TypeError, match="give texts"):
        llm.generate(prompts)
    assert llm.generate("Say 6")[0].text == "six"


@pytest.mark.parametrize("params", [{"max_tokens": 4}, ["greedy"]])
def test_sampling_of_another_kind_is_refused_with_what_to_give(llm, params):
    with pytest.raises(TypeError, match="give SamplingParams"):
        llm.generate(["Say 6"], params)


def test_prompts_may_come_from_a_generator_and_conversations_too(llm):
    assert [c.text for c in llm.generate(f"x {n}" for n in (6, 7))] == ["six", "seven"]
    ask = ([{"role": "user", "content": f"x {digit}"}] for digit in (6, 7))
    assert [c.text for c in llm.chat(ask)] == ["six", "seven"]


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 10**9])
def test_a_token_the_model_does_not_know_is_an_error_of_its_prompt_alone(llm, token_id):
    good = llm.tokenizer.encode("Say 7")
    found = llm.generate([[token_id], good, [*good, token_id]])
    assert [c.finish_reason for c in found] == ["error", "stop", "error"]
    assert str(token_id) in str(found[0].error)


def test_text_that_is_no_unicode_is_an_error_of_its_prompt_alone(llm):
    found = llm.generate(["\ud800", "Say 6"])
    assert [c.finish_reason for c in found] == ["error", "stop"]


def test_a_conversation_the_template_cannot_render_is_an_error_and_the_others_go_on(llm):
    good = [{"role": "user", "content": "x 6"}]
    found = llm.chat([[{"content": "x 6"}], good, [], [{"role": "user"}]])
    assert [c.finish_reason for c in found] == ["error", "stop", "error", "error"]
    assert [str(c.error) for c in found if c.error] == [
        "message 0 has no role",
        "column 'messages' has no messages",
        "message 0 has no content",
    ]


@pytest.mark.parametrize("messages", ["hello", {"role": "user", "content": "x"}, None])
def test_messages_that_are_no_list_are_refused(llm, messages):
    with pytest.raises(TypeError, match="give a list such as"):
        llm.chat(messages)


class Interrupted(DummyBackend):
    """Ctrl-C strikes in its second step."""

    def step(self):
        if self.stats.num_steps:
            raise KeyboardInterrupt
        return super().step()


def test_a_call_that_was_interrupted_leaves_nothing_to_the_next_one():
    with LLM("", backend="dummy") as llm:
        wanted = [c.text for c in llm.generate(["one", "two"])]
        llm._backend = Interrupted(llm._config)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["three", "four", "five"])
        assert [c.text for c in llm.generate(["one", "two"])] == wanted


def test_threads_that_share_a_model_get_their_own_answers(llm):
    digits = {6: "six", 7: "seven", 0: "zero"}
    with ThreadPoolExecutor(3) as threads:
        asked = {d: threads.submit(llm.generate, [f"x {d}"] * 4) for d in digits}
        answers = {d: [c.text for c in future.result()] for d, future in asked.items()}
    assert answers == {d: [text] * 4 for d, text in digits.items()}


def test_a_closed_model_says_so():
    llm = LLM("", backend="dummy")
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="this LLM is closed; make another one"):
        llm.generate("x")


def test_a_model_nobody_refers_to_any_more_is_freed_without_a_close():
    llm = LLM(str(MODELS / "tiny-a"), backend="transformers")
    llm.generate("one", SamplingParams(max_tokens=2))
    model = weakref.ref(next(iter(_modules_of(llm))))
    assert model() is not None
    del llm
    gc.collect()
    assert model() is None


def _modules_of(llm):
    return [m for m in vars(llm.backend).values() if isinstance(m, torch.nn.Module)]
