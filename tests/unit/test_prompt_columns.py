import pyarrow as pa
import pytest

from inference.errors import EngineConfigError
from storage.errors import BadInput
from tasks.job import InputConfig, ModelConfig, OutputConfig, RunConfig
from tasks.prompt_columns import PromptColumns, candidate_columns, choose_columns, text_columns

MESSAGES = pa.list_(pa.struct([("role", pa.string())]))
TEXT = pa.string()


def job(sampling_columns="auto", **settings):
    return RunConfig(
        model=ModelConfig(source="m"),
        input=InputConfig(uri="in", **settings),
        output=OutputConfig(uri="out"),
        sampling_columns=sampling_columns,
    )


def chosen(columns, *, is_openai=False, **settings):
    return choose_columns(job(**settings), columns, is_openai=is_openai, where="f")


@pytest.mark.parametrize(
    ("columns", "kind", "prompt"),
    [
        ({"prompt": TEXT}, "text", "prompt"),
        ({"text": TEXT, "id": TEXT}, "text", "text"),
        ({"messages": MESSAGES}, "messages", "messages"),
        ({"messages": TEXT}, "messages", "messages"),
        ({"prompt": pa.large_string()}, "text", "prompt"),
        ({"prompt": pa.string_view()}, "text", "prompt"),
        ({"prompt": pa.dictionary(pa.int8(), TEXT)}, "text", "prompt"),
        ({"prompt": pa.binary()}, "text", "prompt"),
        ({"prompt": pa.null()}, "text", "prompt"),
        ({"messages": pa.list_(pa.map_(TEXT, TEXT))}, "messages", "messages"),
        ({"messages": pa.json_()}, "messages", "messages"),
    ],
    ids=str,
)
def test_the_one_column_that_can_be_the_prompt_is_it(columns, kind, prompt):
    found = chosen(columns)
    assert (found.kind, found.prompt) == (kind, prompt)


def test_tools_beside_messages_are_used():
    assert chosen({"messages": MESSAGES, "tools": TEXT}).tools == "tools"
    assert chosen({"prompt": TEXT, "tools": TEXT}).tools is None


def test_two_candidates_are_refused_until_one_is_named():
    columns = {"prompt": TEXT, "messages": MESSAGES}
    with pytest.raises(BadInput, match="messages and prompt could both be the prompt"):
        chosen(columns)
    assert chosen(columns, prompt_column="prompt").kind == "text"
    assert chosen(columns, messages_column="messages").kind == "messages"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"no column messages, prompt or text; .*there are: Prompt, id"),
        ({"prompt_column": "prompt"}, r"no column 'prompt'; there are: Prompt, id"),
        ({"messages_column": "chat"}, "no column 'chat'"),
        ({"prompt": "{id} {text}"}, "no column 'text'"),
        ({"prompt": "{id}", "id_column": "key"}, "no column 'key'"),
        ({"prompt": "{id}", "sampling_columns": ["seed"]}, "no column 'seed'"),
        ({"prompt": "{id}", "prompt_column": "id"}, "give one of"),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(settings, said):
    with pytest.raises(BadInput, match=said):
        chosen({"Prompt": TEXT, "id": TEXT}, **settings)


@pytest.mark.parametrize(
    ("columns", "settings", "said"),
    [
        ({"prompt": pa.int64()}, {}, r"'prompt' is int64, not text; .* '\{prompt\}'"),
        ({"prompt": MESSAGES}, {}, "not text"),
        ({"messages": pa.int64()}, {}, "not messages"),
    ],
)
def test_a_column_of_the_wrong_type_is_never_converted_silently(columns, settings, said):
    with pytest.raises(BadInput, match=said):
        chosen(columns, **settings)


def test_a_template_may_use_any_type():
    found = chosen({"n": pa.int64(), "m": MESSAGES}, prompt="{n} {m}")
    assert found.kind == "template"
    assert found.required == ("n", "m")


def test_a_broken_template_is_refused():
    with pytest.raises(EngineConfigError):
        chosen({"a": TEXT}, prompt="{a")


def test_sampling_columns_are_those_named_like_fields_unless_used_otherwise():
    columns = {"prompt": TEXT, "seed": pa.int64(), "stop": TEXT, "n": pa.int64(), "id": TEXT}
    assert chosen(columns).sampling == ("stop", "seed")
    assert chosen(columns, prompt="{stop} {prompt}").sampling == ("seed",)
    assert chosen(columns, sampling_columns=[]).sampling == ()
    assert chosen(columns, id_column="seed").sampling == ("stop",)


@pytest.mark.parametrize("name", ["n", "logprobs", "speed"])
def test_what_cannot_differ_per_row_is_refused(name):
    with pytest.raises(BadInput, match=f"sampling_columns: '?{name}"):
        chosen({"prompt": TEXT, name: pa.int64()}, sampling_columns=[name])


def test_an_openai_batch_takes_its_prompts_from_the_body():
    found = chosen({"custom_id": TEXT, "body": TEXT, "seed": TEXT}, is_openai=True)
    assert (found.kind, found.id, found.sampling) == ("openai", "custom_id", ())
    assert found.used == {"custom_id", "url", "body"}
    with pytest.raises(BadInput, match="OpenAI batch"):
        chosen({"body": TEXT}, is_openai=True, prompt="{body}")


def test_what_was_chosen_survives_the_plan():
    for settings in ({"prompt": "{prompt}!"}, {"prompt_column": "prompt", "id_column": "seed"}):
        found = chosen({"prompt": TEXT, "seed": pa.int64()}, **settings)
        back = PromptColumns.from_json(found.to_json(), settings.get("prompt"))
        assert back.to_json() == found.to_json()
        assert back.used == found.used


def test_everything_that_might_be_used_is_a_candidate():
    found = candidate_columns(job(prompt="{a} {b}", id_column="key"))
    assert {"a", "b", "key", "messages", "prompt", "body", "stop"} <= found
    assert {"a", "key"} <= text_columns(job(prompt="{a}", id_column="key").input)
