import json

import pytest

from inference.chat import drop_nulls, to_messages, to_tools
from inference.errors import PromptError

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "value",
    [
        [USER],
        json.dumps([USER]),
        json.dumps([USER]).encode(),
        [[("role", "user"), ("content", "hi")]],
        [{**USER, "name": None, "tool_calls": None}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        [{"role": "user", "content": ["hi"]}],
    ],
    ids=["list", "json", "bytes", "map", "null-filled", "parts", "strings"],
)
def test_every_form_of_a_conversation_is_the_same_messages(value):
    assert to_messages(value) == [USER]


def test_nulls_vanish_at_every_depth():
    value = {"a": None, "b": [{"c": None, "d": {"e": None, "f": 0}}], "g": ""}
    assert drop_nulls(value) == {"b": [{"d": {"f": 0}}], "g": ""}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"temp": 21, "sky": None}, '{"temp": 21}'),
        ([{"temp": 21}], '[{"temp": 21}]'),
        ([], "[]"),
        (21, "21"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
    ],
)
def test_a_tool_result_never_vanishes(content, expected):
    assert to_messages([{"role": "tool", "content": content}])[0]["content"] == expected


def test_an_assistant_may_have_tool_calls_instead_of_content():
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert to_messages([message]) == [{"role": "assistant", "tool_calls": [{"id": "1"}]}]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "is null"),
        ("null", "is null"),
        ([], "no messages"),
        ("[", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "is a object"),
        ([1], "message 0 is a int"),
        ([{"content": "x"}], "has no role"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"role": "user", "content": 5}], "type int"),
        ([{"role": "user", "content": {"a": 1}}], "type object"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "type image_url"),
        ([{"role": "user", "content": []}], "type nothing"),
    ],
)
def test_malformed_messages_say_what_is_wrong(value, said):
    with pytest.raises(PromptError, match=said) as caught:
        to_messages(value)
    assert caught.value.state == "invalid_input"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ([], None),
        ([{"a": None, "b": 1}], [{"b": 1}]),
        ('[{"b": 1}]', [{"b": 1}]),
        (['{"b": 1}'], [{"b": 1}]),
    ],
)
def test_tools_are_a_list_of_objects_or_none(value, expected):
    assert to_tools(value) == expected


@pytest.mark.parametrize("value", ["x", {"a": 1}, [1], ["1"]])
def test_other_tools_are_refused(value):
    with pytest.raises(PromptError, match="tool"):
        to_tools(value)
