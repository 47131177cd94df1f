"""`nightjar plan`: everything that can be known before a run, and nothing written."""

import json

import pytest

from tests.pipeline import Nightjar


@pytest.fixture
def nightjar(tmp_path, capsys):
    return Nightjar(tmp_path, capsys)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.jsonl"
    texts = ["one", None, "two " * 80, "three \u00e9", "four"]
    ids = ["a", "b", "c", "d", "a"]
    lines = [json.dumps({"id": i, "text": t}) for i, t in zip(ids, texts, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def dummy_job(nightjar, rows, **changes):
    settings = {
        "input__prompt": "Say: {text}",
        "input__id_column": "id",
        "input__on_duplicate_id": "allow",
        "engine__backend": "dummy",
        "engine__max_model_len": 64,
        **changes,
    }
    return nightjar.job("tiny-a", rows, **settings)


def test_a_plan_says_what_is_in_the_input_and_writes_nothing(nightjar, rows, tmp_path):
    before = {path for path in tmp_path.rglob("*") if "job-" not in path.name}
    called = nightjar.call("plan", str(dummy_job(nightjar, rows)), "--json")
    found = called.document
    assert called.code == 0, called.err
    assert {path for path in tmp_path.rglob("*") if "job-" not in path.name} == before
    assert found["schema"] == [{"name": "id", "type": "string"}, {"name": "text", "type": "string"}]
    assert found["samples"][0] == {"id": "a", "text": "one"}
    assert (found["num_rows"], found["num_bad_rows"], found["num_sequences"]) == (5, 2, 3)
    assert [(row["row_index"], row["state"]) for row in found["bad_row_examples"]] == [
        (1, "invalid_input"),
        (2, "overlong"),
    ]
    assert (found["num_repeated_ids"], found["num_repeated_prompts"]) == (1, 0)
    assert sum(found["prompt_tokens_histogram"].values()) == 3
    assert found["first_prompt_row"] == 0
    assert "Say: one" in found["first_prompt"]
    assert found["forecast"]["lengths"]["basis"] == "max_tokens"
    assert "no GPU" in found["hardware"]["reason"]


def test_the_first_prompt_is_what_the_model_is_given_special_tokens_and_all(nightjar, rows):
    job = dummy_job(nightjar, rows, engine__backend="transformers")
    called = nightjar.call("plan", str(job))
    assert called.code == 0, called.err
    assert "  | <|im_start|>user\n  | Say: one<|im_end|>\n  | <|im_start|>assistant\n" in called.out
    assert "forecast   finish: not known" in called.out


def test_ids_that_repeat_refuse_the_plan_as_they_would_the_run(nightjar, rows):
    called = nightjar.call("plan", str(dummy_job(nightjar, rows, input__on_duplicate_id="fail")))
    assert called.code == 2
    assert "appears 2 times" in called.err


def test_a_deadline_nobody_can_read_is_refused_before_the_input_is_read(nightjar, rows):
    called = nightjar.call("plan", str(dummy_job(nightjar, rows, deadline="soon")))
    assert called.code == 2
    assert "deadline: 'soon' is not a time of day; write it as HH:MM" in called.err
