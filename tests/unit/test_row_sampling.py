import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.errors import PromptError
from inference.row_sampling import ROW_FIELDS, row_overrides, row_sampling
from inference.sampling import SamplingParams, draw_seed

RUN = SamplingParams(max_tokens=8, stop=("END",), seed=3)


def sample(**values):
    return row_sampling(RUN, row_overrides(values))


def test_a_null_keeps_the_runs_value_and_the_runs_object():
    assert sample(max_tokens=None, stop=None, temperature="") is RUN


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_tokens", 3, 3),
        ("max_tokens", 3.0, 3),
        ("max_tokens", "3", 3),
        ("seed", 2**60 + 1, 2**60 + 1),
        ("temperature", 1, 1.0),
        ("temperature", "0.7", 0.7),
        ("stop", "x", ("x",)),
        ("stop", ["x", "y"], ("x", "y")),
        ("stop", [], ()),
        ("stop_token_ids", [1, 2], (1, 2)),
        ("stop_token_ids", 7, (7,)),
        ("stop_token_ids", [], ()),
        ("ignore_eos", True, True),
        ("ignore_eos", "false", False),
    ],
)
def test_a_value_overrides_the_runs(name, value, expected):
    found = getattr(sample(**{name: value}), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", "many"),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", [1]),
        ("top_p", 0),
        ("top_p", float("inf")),
        ("stop", 5),
        ("stop", ["x", None]),
        ("stop", [""]),
        ("stop_token_ids", ["x"]),
        ("stop_token_ids", [-1]),
        ("ignore_eos", "maybe"),
        ("min_tokens", 9),
    ],
)
def test_a_bad_value_refuses_its_row_and_names_the_field(name, value):
    with pytest.raises(PromptError, match=name) as caught:
        sample(**{name: value})
    assert caught.value.state == "invalid_input"


def test_what_shapes_the_output_is_not_a_row_field():
    assert not {"n", "logprobs"} & set(ROW_FIELDS)


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())
)


@settings(deadline=None)
@given(values=st.dictionaries(st.sampled_from(ROW_FIELDS), VALUES))
def test_any_values_give_valid_sampling_or_one_refused_row(values):
    try:
        found = sample(**values)
    except PromptError:
        return
    assert isinstance(found, SamplingParams)


def test_a_draw_follows_the_run_the_row_and_the_sample_and_never_changes():
    asked = [
        (seed, row, sample) for seed in (0, 1) for row in (0, 1, "a", "b") for sample in (0, 1)
    ]
    assert len({draw_seed(*each) for each in asked}) == len(asked)
    # Another value for the same row would be another completion in a run that is taken up again.
    assert draw_seed(0, 0, 0) == 13433632324308434416
    assert draw_seed(7, "a", 2) == 8318732675354942349


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", "4"),
        ("max_tokens", 4.0),
        ("seed", None),
        ("n", True),
        ("temperature", "hot"),
        ("top_p", None),
        ("stop", [1]),
        ("stop", 7),
        ("stop_token_ids", 7),
        ("stop_token_ids", ["a"]),
        ("ignore_eos", "yes"),
        ("logprobs", 2.0),
    ],
)
def test_sampling_of_another_kind_is_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got {re.escape(repr(value))}$"):
        SamplingParams(**{field: value})


def test_a_lone_stop_string_is_one_string_and_lists_are_tuples():
    assert (
        SamplingParams(stop="END") == SamplingParams(stop=["END"]) == SamplingParams(stop=("END",))
    )
    assert SamplingParams(stop_token_ids=[3]) == SamplingParams(stop_token_ids=(3,))
