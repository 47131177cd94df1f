import datetime
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.errors import EngineConfigError, PromptError
from inference.prompt_template import PromptTemplate

NAMES = st.text(string.ascii_letters + string.digits + " _-.", min_size=1, max_size=12)
# A field name must not look like a format or an index.
PLAIN_NAMES = NAMES.filter(lambda name: name.strip() == name)
LITERALS = st.text(st.characters(exclude_characters="{}"), max_size=20)


def render(text, **row):
    return PromptTemplate(text).render(row)


def test_fields_are_filled_and_doubled_braces_stay_single():
    assert render("{{x}} {word}!", word="hi") == "{x} hi!"


def test_a_dotted_field_is_a_column_of_that_name_never_an_attribute():
    template = PromptTemplate("{a.__class__}")
    assert template.fields == ("a.__class__",)
    assert template.missing(["a"]) == ["a.__class__"]
    assert template.render({"a.__class__": "a column"}) == "a column"


def test_an_index_is_a_column_name_too():
    assert PromptTemplate("{rows[0]}").missing(["rows"]) == ["rows[0]"]


@pytest.mark.parametrize("text", ["{", "}", "{a", "{}", "{a!r}", "{a:{b}}", "{a:99999999}"])
def test_a_malformed_template_is_refused(text):
    with pytest.raises(EngineConfigError):
        PromptTemplate(text)


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("{v:.2f}", 1.5, "1.50"),
        ("{v}", 9007199254740993, "9007199254740993"),
        ("{v}", datetime.date(2026, 1, 2), "2026-01-02"),
        ("{v}", [{"a": "é"}], '[{"a": "é"}]'),
        ("{v}", b"bytes", "bytes"),
        ("{v:>4}", "x", "   x"),
    ],
)
def test_values_become_text(text, value, expected):
    assert render(text, v=value) == expected


@pytest.mark.parametrize(("text", "value"), [("{v}", None), ("{v:d}", "x"), ("{v}", b"\xff")])
def test_a_value_that_cannot_be_filled_in_refuses_only_its_row(text, value):
    with pytest.raises(PromptError, match="'v'") as caught:
        render(text, v=value)
    assert caught.value.state == "invalid_input"


def test_an_error_never_quotes_the_value():
    with pytest.raises(PromptError) as caught:
        render("{v:d}", v="secret words")
    assert "secret" not in str(caught.value)


@given(parts=st.lists(st.tuples(LITERALS, PLAIN_NAMES, st.text(max_size=8)), max_size=4))
def test_any_plain_columns_round_trip(parts):
    text = "".join(f"{literal}{{{name}}}" for literal, name, _ in parts)
    row = {name: value for _, name, value in parts}
    expected = "".join(literal + row[name] for literal, name, _ in parts)
    assert PromptTemplate(text).render(row) == expected


@given(text=st.text(max_size=40))
def test_any_text_is_a_template_or_a_clear_refusal(text):
    try:
        template = PromptTemplate(text)
    except EngineConfigError:
        return
    row = dict.fromkeys(template.fields, "v")
    try:
        rendered = template.render(row)
    except PromptError:
        return
    assert isinstance(rendered, str)
