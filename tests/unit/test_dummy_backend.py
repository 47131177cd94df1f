"""What the dummy backend promises beyond the protocol."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from inference.backends.dummy import DummyBackend
from inference.backends.dummy_tokenizer import VOCAB_SIZE, DummyTokenizer
from inference.config import EngineConfig
from inference.sampling import SamplingParams
from inference.sequence import Sequence

ROOT = Path(__file__).parents[2]


def run(sampling: SamplingParams, num: int = 200) -> list:
    backend = DummyBackend(EngineConfig(model="", backend="dummy", max_num_seqs=16))
    backend.submit(Sequence(i, [3 + i % 256, 9], sampling) for i in range(num))
    found = []
    while backend.num_unfinished:
        found += backend.step()
    return found


def test_it_needs_no_torch():
    code = (
        "import sys; from inference import LLM; "
        "assert LLM('', backend='dummy').generate('hello')[0].text; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_most_completions_end_by_themselves_and_some_do_not():
    reasons = Counter(
        completion.finish_reason for completion in run(SamplingParams(max_tokens=100))
    )
    assert set(reasons) == {"stop", "length"}
    assert 1 < reasons["length"] < 50


def test_completions_finish_out_of_order():
    order = [completion.seq_id for completion in run(SamplingParams(max_tokens=100))]
    assert order != sorted(order)


def test_fewer_max_tokens_give_a_beginning_of_the_same_completion():
    short = {c.seq_id: c for c in run(SamplingParams(max_tokens=4))}
    for completion in run(SamplingParams(max_tokens=64)):
        assert completion.token_ids[:4] == short[completion.seq_id].token_ids


def test_a_step_can_be_made_to_last():
    backend = DummyBackend(EngineConfig(model="", backend="dummy"), step_s=0.02)
    backend.submit([Sequence(0, [5], SamplingParams(max_tokens=3, ignore_eos=True))])
    while backend.num_unfinished:
        backend.step()
    assert backend.stats.decode_s >= 0.06


def test_the_tokenizer_gives_back_any_text():
    tokenizer = DummyTokenizer()
    text = "line\n\ttab \N{FOX FACE} e\u0301 \0"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0, 1, 2]) == ""


def test_the_tokenizer_refuses_what_it_cannot_hold():
    with pytest.raises(UnicodeEncodeError):
        DummyTokenizer().encode("\ud835")
    with pytest.raises(ValueError, match=f"{VOCAB_SIZE}"):
        DummyTokenizer().decode([VOCAB_SIZE])
