"""Ids to text: whole characters, stop strings wherever they lie, reasoning apart from the answer."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from inference.backends.dummy_tokenizer import DummyTokenizer
from inference.detokenise import StopChecker, decoder_of, finish_text, split_reasoning
from inference.end_tokens import end_token_ids, special_token_ids
from inference.errors import ModelError

MODELS = Path(__file__).parents[1] / "data" / "models"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(MODELS / "tiny-a"), local_files_only=True)


def first_hit(decode, token_ids, stop, min_tokens=0):
    """Return how many tokens were read when a stop string was found, or None."""
    checker = StopChecker(decode, stop, min_tokens)
    for num_read, token_id in enumerate(token_ids, 1):
        if checker.append(token_id):
            return num_read
    return None


def test_a_character_of_four_tokens_comes_out_whole(tokenizer):
    decode = decoder_of(tokenizer)
    token_ids = tokenizer.encode("Fox \N{FOX FACE}!", add_special_tokens=False)
    assert len(token_ids) >= 6
    assert finish_text(decode, token_ids) == ("Fox \N{FOX FACE}!", False)


def test_a_character_cut_off_becomes_a_replacement(tokenizer):
    text, _ = finish_text(
        decoder_of(tokenizer), tokenizer.encode("\N{FOX FACE}", add_special_tokens=False)[:2]
    )
    assert set(text) == {"\N{REPLACEMENT CHARACTER}"}


def test_special_tokens_are_not_text(tokenizer):
    token_ids = tokenizer.encode("<|im_start|>on<|im_end|><|endoftext|>", add_special_tokens=False)
    assert finish_text(decoder_of(tokenizer), token_ids)[0] == "on"


def test_spaces_before_punctuation_stay(tokenizer):
    text = " a , b . c 's  d"
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert finish_text(decoder_of(tokenizer), token_ids)[0] == text


@pytest.mark.parametrize(
    ("text", "stop", "cut"),
    [
        ("one END. two", ("END",), "one "),
        ("one END. two", ("two", "D. t"), "one EN"),
        ("xxab", ("b", "ab"), "xx"),
        ("END", ("END",), ""),
        ("aaab", ("aab",), "a"),
        ("f \N{FOX FACE} g", ("\N{FOX FACE}",), "f "),
        ("line\n\nmore", ("\n\n",), "line"),
        ("nothing here", ("END",), None),
    ],
)
def test_text_is_cut_before_the_first_stop_string(text, stop, cut):
    tokenizer = DummyTokenizer()
    token_ids = tokenizer.encode(text)
    num_read = first_hit(tokenizer.decode, token_ids, stop)
    assert finish_text(tokenizer.decode, token_ids, stop) == (
        cut if cut is not None else text,
        cut is not None,
    )
    assert (num_read is None) == (cut is None)
    if num_read is not None:
        assert finish_text(tokenizer.decode, token_ids[:num_read], stop) == (cut, True)


@pytest.mark.parametrize(
    ("min_tokens", "text"),
    [(0, "a"), (1, "a"), (2, "a"), (3, "axaax"), (5, "axaax"), (6, None), (7, None)],
)
def test_min_tokens_ignores_stops_that_end_within_them(min_tokens, text):
    tokenizer = DummyTokenizer()
    whole = "axaax-x"
    found = finish_text(tokenizer.decode, tokenizer.encode(whole), ("xa", "-"), min_tokens)
    assert found == ((whole, False) if text is None else (text, True))


TEXT = st.text(st.sampled_from("ab\u00e9\N{FOX FACE} "), max_size=24)


@settings(max_examples=300, deadline=None)
@given(TEXT, st.lists(TEXT.filter(bool), min_size=1, max_size=3), st.integers(0, 12))
def test_reading_token_by_token_finds_what_the_whole_text_shows(text, stop, min_tokens):
    """Against the plain rule: the shortest beginning whose whole characters hold a stop string."""
    tokenizer = DummyTokenizer()
    token_ids = tokenizer.encode(text)
    expected = next(
        (
            end
            for end in range(1, len(token_ids) + 1)
            if end > min_tokens
            and finish_text(tokenizer.decode, token_ids[:end], stop, min_tokens)[1]
        ),
        None,
    )
    found = first_hit(tokenizer.decode, token_ids, stop, min_tokens)
    if min_tokens == 0:
        assert found == expected
    else:
        # Where min_tokens falls inside a character the checker may look a token early; the whole text decides.
        assert expected is None or (found is not None and found <= expected)


def test_a_long_run_of_broken_bytes_stays_cheap_and_stops_after_it():
    tokenizer = DummyTokenizer()
    decoded: list[int] = []

    def decode(token_ids):
        decoded.append(len(token_ids))
        return tokenizer.decode(token_ids)

    token_ids = [3 + 0x80] * 500 + tokenizer.encode("END")
    assert first_hit(decode, token_ids, ("END",)) == 503
    assert max(decoded) < 64


@pytest.mark.parametrize(
    ("text", "is_thinking", "expected"),
    [
        ("plain", False, (None, "plain")),
        ("", False, (None, "")),
        ("<think>\nwhy\n</think>\n\nyes", False, ("\nwhy\n", "\n\nyes")),
        ("\n<think>why</think>yes", False, ("why", "yes")),
        ("why</think>yes", True, ("why", "yes")),
        ("<think>why</think>yes", True, ("why", "yes")),
        ("\n\n</think>\n\nyes", True, ("\n\n", "\n\nyes")),
        ("<think></think>yes", False, ("", "yes")),
        ("never closed", True, ("never closed", "")),
        ("<think>never closed", False, ("never closed", "")),
        ("use the <think> tag </think> like this", False, (None, "use the <think> tag </think> like this")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("</think>", True, ("", "")),
    ],
)  # fmt: skip
def test_reasoning_is_split_from_the_answer(text, is_thinking, expected):
    assert split_reasoning(text, is_thinking) == expected


def load(name):
    return AutoTokenizer.from_pretrained(str(MODELS / name), local_files_only=True)


def test_end_tokens_come_from_every_file_and_from_the_tokenizer():
    assert end_token_ids(MODELS / "chain-a", load("chain-a")) == {321, 323}
    # generation_config.json names <|endoftext|> alone; the chat's end token counts all the same.
    assert end_token_ids(MODELS / "chain-a-geneos", load("chain-a-geneos")) == {321, 323}


def test_end_tokens_of_a_folder_without_files_are_the_tokenizers(tmp_path, tokenizer):
    assert end_token_ids(tmp_path, tokenizer) == {321, 323}


@pytest.mark.parametrize(
    ("written", "more"),
    [('{"eos_token_id": 5}', {5}), ('{"eos_token_id": [5, 6]}', {5, 6}),
     ('{"eos_token_id": null}', set()), ('{"text_config": {"eos_token_id": 7}}', {7})],
)  # fmt: skip
def test_eos_may_be_a_number_a_list_or_nothing(tmp_path, tokenizer, written, more):
    (tmp_path / "config.json").write_text(written)
    assert end_token_ids(tmp_path, tokenizer) == {321, 323} | more


def test_an_end_token_that_is_no_id_is_refused(tmp_path, tokenizer):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "stop"}')
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id"):
        end_token_ids(tmp_path, tokenizer)


def test_only_special_tokens_are_looked_up(tokenizer):
    assert special_token_ids(tokenizer, ["<|im_start|>", "<think>", "on"]) == {322}
