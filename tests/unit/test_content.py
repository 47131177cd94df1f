"""What makes two answers the same: everything that can change a token, and nothing else."""

import dataclasses
from array import array

import numpy as np
import pytest

from inference.sampling import SamplingParams
from storage.answers import answers_key, read_answers, write_answers
from storage.errors import CorruptObject
from storage.manifest import CommitRecord, PartFile
from tasks.content import NOT_RUN, answer_digest, engine_digest, prompt_digest, row_digest
from tasks.results import ResultColumns
from tasks.reuse import ReuseIndex

PROMPT = prompt_digest([1, 2, 3], is_thinking=False)
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.7)


def test_a_prompt_is_its_tokens_and_whether_it_is_thinking():
    assert prompt_digest(array("i", [1, 2, 3]), is_thinking=False) == PROMPT
    others = [([1, 2], False), ([1, 23], False), ([1, 2, 3], True), ([3, 2, 1], False)]
    found = {prompt_digest(tokens, is_thinking=thinking) for tokens, thinking in others}
    assert len(found | {PROMPT}) == 5


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(SamplingParams)])
def test_every_sampling_field_keeps_sampled_rows_apart_but_their_number(name):
    other = {"stop": ("x",), "stop_token_ids": (7,), "ignore_eos": True, "top_p": 0.5, "min_p": 0.5}
    values = {
        "n": 2,
        "seed": 1,
        "logprobs": 1,
        "max_tokens": 9,
        "min_tokens": 1,
        "top_k": 4,
        **other,
    }
    changed = dataclasses.replace(SAMPLED, **{name: values.get(name, 1.5)})
    same = row_digest(PROMPT, changed, "a") == row_digest(PROMPT, SAMPLED, "a")
    assert same == (name == "n")


def test_draws_follow_the_row_and_its_seed_and_greedy_rows_have_none():
    reseeded = dataclasses.replace(GREEDY, seed=5)
    assert row_digest(PROMPT, GREEDY, 1) == row_digest(PROMPT, reseeded, "else")
    assert row_digest(PROMPT, SAMPLED, 1) != row_digest(PROMPT, SAMPLED, 2)
    # An id that is a number and one that spells it draw alike.
    assert row_digest(PROMPT, SAMPLED, 1) == row_digest(PROMPT, SAMPLED, "1")


def test_an_engine_is_its_weights_and_settings_and_not_the_jobs_columns():
    fields = {"model.content_id": "a", "engine.backend": "paged", "input.prompt": "x"}
    same = {**fields, "input.prompt": "y", "output.columns": ["z"]}
    assert engine_digest(fields) == engine_digest(same)
    for name in ("model.content_id", "model.quantization", "engine.kv_cache_dtype"):
        assert engine_digest({**fields, name: "other"}) != engine_digest(fields)
    row = row_digest(PROMPT, GREEDY, 1)
    engine = engine_digest(fields)
    assert answer_digest(engine, row, 0) != answer_digest(engine, row, 1)


def test_digests_of_rows_that_are_not_ok_are_left_out_and_damage_is_found(tmp_path):
    digests = [bytes([n]) * 16 for n in range(1, 20)]
    is_ok = [n % 3 > 0 for n in range(19)]
    written = write_answers(tmp_path / "answers.parquet", b"".join(digests), is_ok)
    data = written.path.read_bytes()
    column = read_answers(data, sha256=written.sha256, source="here")
    assert column.to_pylist() == [d if ok else None for d, ok in zip(digests, is_ok, strict=True)]
    assert written.num_answers == sum(is_ok)
    with pytest.raises(CorruptObject, match="its commit says"):
        read_answers(data[:-1], sha256=written.sha256, source="here")
    with pytest.raises(ValueError, match="for 19 rows"):
        write_answers(tmp_path / "more.parquet", b"", is_ok)


def test_answers_of_many_parts_are_found_at_24_bytes_each(tmp_path, memory_store):
    rng = np.random.default_rng(3)
    digests = [rng.bytes(16) for _ in range(20_000)]
    commits = []
    for shard_id in range(4):
        mine = digests[5_000 * shard_id : 5_000 * (shard_id + 1)]
        written = write_answers(tmp_path / "a.parquet", b"".join(mine), [True] * 5_000)
        commit = CommitRecord(
            shard_id=shard_id,
            revision=1,
            nonce="n",
            attempt=1,
            plan_digest="p",
            row_start=0,
            row_end=5_000,
            part=PartFile(key="k", size=0, sha256="", num_rows=5_000),
            counts={},
            receipt={"answers": written.sha256},
            holder="h",
            committed_at="",
        )
        memory_store.upload(written.path, answers_key(commit))
        commits.append(commit)
    index = ReuseIndex(b"", ResultColumns(token_ids=False, logprobs=False), tmp_path / "reuse")
    assert index.add(memory_store, commits) == index.num_answers == 20_000
    wanted = [digests[5], NOT_RUN, digests[19_999], b"x" * 16, digests[5]]
    assert index.locate(wanted) == [5, -1, 3 << 32 | 4_999, -1, 5]
    assert index.num_bytes == 24 * 20_000
