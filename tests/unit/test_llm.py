"""LLM: the engine in a notebook."""

from pathlib import Path

import pytest

from inference import LLM, SamplingParams
from inference.sampling import draw_seed
from inference.sequence import Sequence

MODELS = Path(__file__).parents[1] / "data" / "models"


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
