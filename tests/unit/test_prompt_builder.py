import json
import shutil
from pathlib import Path

import pytest

from inference.errors import EngineConfigError, ModelError, PromptError
from inference.prompt import PromptBuilder, PromptConfig

MODELS = Path(__file__).parent.parent / "data" / "models"
USER = [{"role": "user", "content": "Hello"}]


def builder(model="tiny-a", **config):
    return PromptBuilder(MODELS / model, PromptConfig(**{"max_model_len": 256, **config}))


def tokens(built, text):
    (ids,) = built.encode([text])
    return ids


@pytest.fixture(scope="module")
def tiny():
    return builder()


@pytest.fixture(scope="module")
def raw():
    return builder("tiny-a-nochat", chat_template="none")


def test_text_under_a_chat_template_is_one_user_message(tiny):
    assert tiny.render_text("Hello") == tiny.render_messages(USER)


def test_null_filled_messages_render_like_clean_ones(tiny):
    filled = [{**USER[0], "name": None, "tool_calls": None}]
    assert tiny.render_messages(filled, None) == tiny.render_messages(USER)
    assert "None" not in tiny.render_messages(filled)


def test_tools_and_tool_results_reach_the_model(tiny):
    tools = [{"type": "function", "function": {"name": "lamp", "parameters": None}}]
    messages = [*USER, {"role": "tool", "content": {"temp_c": 21}}]
    text = tiny.render_messages(messages, tools)
    assert '{"temp_c": 21}' in text
    assert json.dumps({"type": "function", "function": {"name": "lamp"}}) in text


def test_template_and_tokenizer_write_one_bos_between_them():
    built = builder("tiny-a-bos")
    ids = tokens(built, built.render_text("Hello"))
    bos = built.encode_token("<|begin|>")
    assert ids.count(bos) == 1
    assert ids[0] == bos


def test_a_raw_prompt_that_brings_its_bos_has_one():
    built = builder("tiny-a-bos", chat_template="none")
    bos = built.encode_token("<|begin|>")
    with_bos = tokens(built, "<|begin|>Hello")
    assert with_bos == tokens(built, "Hello")
    assert with_bos.count(bos) == 1


def test_a_raw_prompt_goes_in_as_it_is(raw):
    assert raw.render_text("  Hello ") == "  Hello "
    assert not raw.is_chat


def test_an_empty_prompt_runs_under_a_template_and_is_refused_raw(tiny, raw):
    text = tiny.render_text("")
    assert tiny.finish(text, tokens(tiny, text), max_tokens=1).num_tokens > 0
    with pytest.raises(PromptError, match="no tokens"):
        raw.finish("", tokens(raw, ""), max_tokens=1)


@pytest.mark.parametrize("value", [None, 42, ["x"], b"x"])
def test_what_is_not_text_is_refused(tiny, value):
    with pytest.raises(PromptError, match="'prompt'"):
        tiny.render_text(value)


def test_half_a_surrogate_pair_is_refused(tiny):
    with pytest.raises(PromptError, match="surrogate"):
        tiny.render_text("half \ud835")


def test_special_tokens_in_columns_of_a_chat_are_the_tokenizers_business(tiny):
    text = tiny.render_text("<|im_end|>")
    assert tokens(tiny, text).count(tiny.encode_token("<|im_end|>")) == 2


def test_a_model_without_a_chat_template_is_refused_with_the_remedies():
    with pytest.raises(
        EngineConfigError, match=r"no chat template; set input\.chat_template .* none"
    ):
        builder("tiny-a-nochat")


def test_messages_without_any_template_are_refused():
    with pytest.raises(EngineConfigError, match="has messages"):
        builder("tiny-a-nochat", chat_template="none", has_messages=True)


def test_a_template_may_be_a_file_or_the_text_itself(tmp_path):
    text = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    file = tmp_path / "own.jinja"
    file.write_text(text)
    for choice in (text, str(file)):
        assert builder("tiny-a-nochat", chat_template=choice).render_text("x") == "<x>"


def test_a_template_file_that_is_not_there_is_refused():
    with pytest.raises(EngineConfigError, match="cannot read"):
        builder(chat_template="nowhere.jinja")


def test_a_broken_template_is_refused_before_any_row():
    with pytest.raises(EngineConfigError, match="wrong at line 2"):
        builder(chat_template="{{ messages }}\n{% if %}")


def test_switches_change_the_prompt():
    off = builder(chat_template_kwargs={"enable_thinking": False}).render_messages(USER)
    on = builder(chat_template_kwargs={"enable_thinking": True}).render_messages(USER)
    assert off.removesuffix("<think>\n\n</think>\n\n") == on


def test_a_switch_the_template_never_reads_is_warned_of_once():
    built = builder("tiny-a-nothink", chat_template_kwargs={"enable_thinking": False})
    assert len(built.warnings) == 1
    assert "enable_thinking has no effect" in built.warnings[0]
    assert builder(chat_template_kwargs={"enable_thinking": False}).warnings == []


def test_a_template_that_writes_the_date_is_warned_of():
    built = builder(chat_template="{{ strftime_now('%d') }}{{ messages[0].content }}")
    assert "today's date" in built.warnings[0]


@pytest.mark.parametrize("name", ["messages", "tokenize", "chat_template", "conversation"])
def test_the_calls_own_arguments_cannot_be_smuggled_in(name):
    with pytest.raises(EngineConfigError, match=name):
        builder(chat_template_kwargs={name: 1})


def test_a_template_error_is_shown_only_in_the_templates_own_words():
    built = builder(
        chat_template="{% if messages[0].content == 'a' %}{{ raise_exception('no a allowed') }}"
        "{% else %}{{ raise_exception(messages[0].content) }}{% endif %}"
    )
    with pytest.raises(PromptError, match="no a allowed"):
        built.render_text("a")
    with pytest.raises(PromptError) as caught:
        built.render_text("private")
    assert "private" not in str(caught.value)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ '%s'|attr('format') }}{{ ''.format.__self__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_cannot_reach_python(attack):
    built = builder(chat_template=attack + "{{ messages[0].content }}")
    try:
        text = built.render_text("x")
    except PromptError:
        return
    assert "class" not in text
    assert "globals" not in text


def test_an_open_think_block_is_noticed_only_at_the_end():
    built = builder(chat_template="{{ messages[0].content }}{{ '<think>\n' if open else '' }}")
    opened = builder(
        chat_template="{{ messages[0].content }}{{ '<think>\n' if open else '' }}",
        chat_template_kwargs={"open": True},
    )
    for each, expected in ((built, False), (opened, True)):
        text = each.render_text("what does <think> mean")
        assert each.finish(text, tokens(each, text), max_tokens=1).is_thinking is expected


def test_a_prompt_must_leave_room_for_one_token(raw):
    ids = list(range(1, 300))
    assert raw.finish("x", ids[:255], max_tokens=8).num_tokens == 255
    with pytest.raises(PromptError, match="length is 256 tokens, the limit is 256") as caught:
        raw.finish("x", ids[:256], max_tokens=8)
    assert caught.value.state == "overlong"


@pytest.mark.parametrize(
    ("how", "max_tokens", "first", "last", "count"),
    [
        ("truncate_left", 56, 101, 300, 200),
        ("truncate_right", 56, 1, 200, 200),
        ("truncate_left", 1000, 173, 300, 128),
    ],
)
def test_truncation_leaves_room_for_the_completion(how, max_tokens, first, last, count):
    built = builder("tiny-a-nochat", chat_template="none", on_overlong=how)
    prompt = built.finish("x", list(range(1, 301)), max_tokens=max_tokens)
    assert prompt.is_truncated
    assert (prompt.token_ids[0], prompt.token_ids[-1], len(prompt.token_ids)) == (
        first,
        last,
        count,
    )


def test_truncating_on_the_left_keeps_the_bos():
    built = builder("tiny-a-bos", chat_template="none", on_overlong="truncate_left")
    bos = built.encode_token("<|begin|>")
    prompt = built.finish("x", [bos, *range(1, 301)], max_tokens=56)
    assert prompt.token_ids[:2] == [bos, 102]
    assert len(prompt.token_ids) == 200


def test_a_tokenizer_with_its_own_code_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'
    )
    with pytest.raises(ModelError, match="auto_map"):
        PromptBuilder(tmp_path, PromptConfig(max_model_len=8))


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelError, match=str(tmp_path)):
        PromptBuilder(tmp_path, PromptConfig(max_model_len=8))


def test_a_model_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        PromptBuilder(tmp_path / "none", PromptConfig(max_model_len=8))


def test_truncation_saved_in_a_tokenizer_file_does_not_apply(tmp_path):
    for file in (MODELS / "tiny-a-nochat").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    built = PromptBuilder(tmp_path, PromptConfig(max_model_len=256, chat_template="none"))
    assert len(tokens(built, "a long enough prompt")) > 4


def test_a_token_the_model_has_no_place_for_refuses_its_row_alone(tmp_path):
    shutil.copytree(MODELS / "tiny-a", tmp_path, dirs_exist_ok=True)
    built = PromptBuilder(tmp_path, PromptConfig(max_model_len=256))
    ids = tokens(built, built.render_text("Hello"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": max(ids)}))
    built = PromptBuilder(tmp_path, PromptConfig(max_model_len=256))
    with pytest.raises(
        PromptError, match=f"token id {max(ids)} is not among the model's {max(ids)}"
    ):
        built.finish("Hello", ids, max_tokens=4)
    assert built.finish("H", [min(ids)], max_tokens=4).token_ids == [min(ids)]
