"""Inputs that were reported to break other tools, planned and fed whole."""

import dataclasses
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inference.errors import EngineConfigError
from storage.errors import BadInput, InputChanged
from tests.feed_bench import CASES, Bench, make_job


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_one_overlong_prompt_is_one_row_with_its_length_and_the_limit(bench):
    fed = bench.run(CASES / "B1-one-long-row/input.parquet", "tiny-a")
    assert fed.tokens() == {
        "b1-0": 34,
        "b1-1": 41,
        "b1-2": 43,
        "b1-3": 48,
        "b1-4": 988,
        "b1-5": 64,
        "b1-6": 60,
        "b1-7": 72,
        "b1-8": 71,
    }
    bad = [row for row in fed.rows if row.state is not None]
    assert [row.state for row in bad] == ["overlong"]
    assert "length is 988" in bad[0].error
    assert "256" in bad[0].error
    assert len(bad[0].token_ids) == 0
    assert fed.plan.num_prompt_tokens == sum(fed.tokens().values()) - 988


def test_null_is_refused_and_blank_text_runs(bench):
    fed = bench.run(CASES / "C1-null-and-empty/input.parquet", "chain-a")
    assert fed.tokens() == {
        "c1-0": 10,
        "c1-1": None,
        "c1-2": 5,
        "c1-3": 8,
        "c1-4": 6,
        "c1-5": 10,
        "c1-6": 8,
        "c1-7": 10,
    }
    assert [row.state for row in fed.rows].count("invalid_input") == 1


def test_a_missing_key_is_a_null(bench):
    fed = bench.run(CASES / "C1-null-and-empty/input.jsonl", "chain-a")
    states = [row.state for row in fed.rows]
    assert states == [None, "invalid_input", "invalid_input", None, None, None, None, None]


def test_raw_empty_text_is_refused_because_it_has_no_tokens(bench):
    fed = bench.run(
        CASES / "C1-null-and-empty/input.parquet", "tiny-a-nochat", chat_template="none"
    )
    assert [row.state for row in fed.rows].count("invalid_input") == 2
    assert fed.rows[2].error == "the prompt has no tokens"
    assert fed.tokens()["c1-0"] == 5


@pytest.mark.parametrize("max_rows", [1, 5, 12])
def test_bad_rows_shift_nothing(bench, max_rows):
    source = CASES / "C2-no-shift-after-failure/input.parquet"
    fed = bench.run(source, "chain-a", shards={"max_rows": max_rows})
    bad = {record["id"] for record, row in zip(fed.records, fed.rows, strict=True) if row.state}
    assert bad == {"c2-01", "c2-05", "c2-06"}
    assert fed.records == pq.read_table(source).to_pylist()
    assert (fed.tokens()["c2-00"], fed.tokens()["c2-11"]) == (16, 17)
    assert len(fed.shards) == -(-12 // max_rows)


def test_half_a_surrogate_pair_costs_one_row_and_the_output_is_valid(bench):
    fed = bench.run(CASES / "C3-lone-surrogate/input.jsonl", "chain-a")
    assert [row.state for row in fed.rows] == [None, "invalid_input", None, None]
    assert fed.tokens() == {"c3-0": 10, "c3-1": None, "c3-2": 10, "c3-3": 23}
    assert fed.records[2]["meta"] == {"src": "bad meta \ufffd"}
    assert fed.records[3]["prompt"] == "whole pair \U0001d400 then 6"
    for batch in fed.batches:
        batch.columns.validate(full=True)
    assert any("U+FFFD" in warning for warning in fed.plan.stats["warnings"])


def test_template_and_tokenizer_write_one_bos_between_them(bench):
    fed = bench.run(CASES / "D1-double-bos/input.parquet", "tiny-a-bos")
    assert fed.tokens() == {"d1-0": 32, "d1-1": 42, "d1-2": 44, "d1-3": 51}


def test_a_tool_result_that_is_an_object_or_a_list_reaches_the_model(bench):
    fed = bench.run(CASES / "D2-tool-content-object/input.jsonl", "tiny-a")
    assert fed.tokens() == {"d2-str": 159, "d2-obj": 159, "d2-list": 161}


@pytest.mark.parametrize("name", ["messages.jsonl", "prompts.parquet"])
def test_a_model_without_a_chat_template_is_refused_once_before_any_shard(bench, name):
    with pytest.raises(EngineConfigError, match=r"no chat template; set input\.chat_template"):
        bench.run(CASES / "D3-no-chat-template" / name, "tiny-a-nochat")


def test_raw_prompts_run_when_they_are_asked_for(bench):
    source = CASES / "D3-no-chat-template/prompts.parquet"
    fed = bench.run(source, "tiny-a-nochat", chat_template="none")
    assert fed.tokens() == {"d3-p0": 6, "d3-p1": 8}


@pytest.mark.parametrize(
    ("thinking", "tokens"), [(False, [33, 52, 64, 83]), (True, [27, 46, 58, 77])]
)
def test_the_thinking_switch_reaches_the_template(bench, thinking, tokens):
    kwargs = {"enable_thinking": thinking}
    source = CASES / "D4-thinking-off/input.jsonl"
    fed = bench.run(source, "tiny-a", chat_template_kwargs=kwargs)
    assert list(fed.tokens().values()) == tokens
    assert not any(row.is_thinking for row in fed.rows)
    assert fed.warnings == []


@pytest.mark.parametrize("name", ["clean.jsonl", "null_filled.parquet"])
def test_null_filled_structs_give_the_prompts_of_clean_ones(bench, name):
    fed = bench.run(CASES / "D5-null-filled-structs" / name, "tiny-a")
    assert fed.tokens() == {"d5-0": 20, "d5-1": 233, "d5-2": 128, "d5-3": 222}


def test_both_forms_of_the_same_messages_are_the_same_tokens(tmp_path):
    found = []
    for name in ("clean.jsonl", "null_filled.parquet"):
        (tmp_path / name).mkdir()
        fed = Bench(tmp_path / name).run(CASES / "D5-null-filled-structs" / name, "tiny-a")
        found.append([list(row.token_ids) for row in fed.rows])
    assert found[0] == found[1]


def test_a_switch_the_template_never_reads_is_warned_of_once(bench):
    fed = bench.run(
        CASES / "D9-template-without-switch/input.jsonl",
        "tiny-a-nothink",
        chat_template_kwargs={"enable_thinking": False},
    )
    assert fed.tokens() == {"d9-0": 20, "d9-1": 19}
    unused = [w for w in fed.plan.stats["warnings"] if "never reads it" in w]
    assert len(unused) == 1
    assert "enable_thinking" in unused[0]


def test_parameters_in_columns_are_each_rows_own(bench):
    fed = bench.run(
        CASES / "E5-row-parameters/input.parquet", "chain-a", sampling={"stop_token_ids": [9]}
    )
    sampling = [row.sampling for row in fed.rows]
    assert [each.max_tokens for each in sampling] == [3, 8, 5, 2]
    assert [each.stop_token_ids for each in sampling] == [(9,), (292,), (9,), ()]
    assert any("max_tokens" in warning for warning in fed.plan.stats["warnings"])


def test_parameters_in_columns_can_be_switched_off(bench):
    fed = bench.run(CASES / "E5-row-parameters/input.parquet", "chain-a", sampling_columns=[])
    assert {row.sampling.max_tokens for row in fed.rows} == {8}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("F1-csv-bom/input.csv", {"f1-0": 10, "f1-1": 11}),
        ("F2-csv-multiline/input.csv", {"f2-0": 21, "f2-1": 18, "f2-2": 22, "f2-3": 18}),
        ("F4-folder-with-extras/input", {"f4-0": 10, "f4-1": 10, "f4-2": 10}),
    ],
)
def test_awkward_files_are_read_as_they_are_meant(bench, name, tokens):
    assert bench.run(CASES / name, "chain-a").tokens() == tokens


def test_csv_prompts_keep_their_line_breaks(bench):
    fed = bench.run(CASES / "F2-csv-multiline/input.csv", "chain-a")
    assert [record["prompt"] for record in fed.records] == [
        "line one\nline two 6",
        'say "hi", then 7',
        "blank line\n\ninside 8",
        "crlf\r\ninside 0",
    ]


def test_large_integer_ids_stay_exact_beside_a_null(bench):
    fed = bench.run(CASES / "F3-big-integer-ids/input.parquet", "chain-a", id_column="id")
    ids = [9007199254740993, 9007199254740992, None, 4873214862074861313, 1]
    assert fed.batches[0].columns.schema.field("id").type == pa.int64()
    assert [record["id"] for record in fed.records] == ids
    # A null id is nobody's duplicate; its row goes by its position.
    assert [row.row_key for row in fed.rows] == [ids[0], ids[1], 2, ids[3], 1]


@pytest.mark.parametrize("name", ["zero_rows.parquet", "empty.jsonl", "header_only.csv"])
def test_no_rows_is_a_plan_without_shards(bench, name):
    fed = bench.run(CASES / "F5-no-rows" / name, "chain-a")
    assert (fed.plan.num_rows, fed.shards, fed.batches) == (0, [], [])


def test_a_custom_id_that_repeats_is_refused_naming_it_and_its_lines(bench):
    with pytest.raises(BadInput, match="'f6-a' appears 3 times: line 1, line 3, line 5"):
        bench.run(CASES / "F6-duplicate-custom-id/input.jsonl", "chain-a")


def test_repeated_custom_ids_can_be_allowed_and_rows_stay_in_place(bench):
    fed = bench.run(
        CASES / "F6-duplicate-custom-id/input.jsonl", "chain-a", on_duplicate_id="allow"
    )
    assert [row.row_key for row in fed.rows] == ["f6-a", "f6-b", "f6-a", "f6-c", "f6-a"]
    assert [row.num_prompt_tokens for row in fed.rows] == [10] * 5
    assert {row.sampling.max_tokens for row in fed.rows} == {8}


def test_other_bytes_under_the_same_name_size_and_time_are_another_input(tmp_path):
    source = tmp_path / "prompts.jsonl"
    etags, texts = [], []
    for version in ("v1", "v2"):
        shutil.copy(CASES / "F7-file-changed-same-name" / version / "prompts.jsonl", source)
        os.utime(source, (1_767_225_600, 1_767_225_600))
        (tmp_path / version).mkdir()
        fed = Bench(tmp_path / version).run(source, "chain-a")
        etags.append(fed.plan.inputs[0].etag)
        texts.append([record["prompt"] for record in fed.records])
    assert etags[0] != etags[1]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_an_input_changed_after_planning_is_refused_with_both_etags(bench, tmp_path, kind):
    source = tmp_path / f"prompts.{kind}"
    stat = None
    for text in ("one", "two"):
        if kind == "parquet":
            pq.write_table(pa.table({"prompt": [text]}), source)
        else:
            source.write_text(json.dumps({"prompt": text}))
        if stat is None:
            stat = source.stat()
            job = make_job(source)
            plan = bench.plan(job, "chain-a")
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = plan.inputs[0].etag
    with (
        bench.open(job, "chain-a") as feed,
        pytest.raises(InputChanged, match=f"ETag was {before}, is sha256:"),
    ):
        next(feed.read(plan, 0, 1))


def test_a_line_of_megabytes_in_a_packed_file_is_kept_in_full(bench):
    fed = bench.run(CASES / "F9-long-line/input.jsonl.gz", "chain-a")
    assert fed.tokens() == {"f9-0": 10, "f9-1": 10, "f9-2": 10}
    assert len(fed.records[0]["note"]) == 3_200_000


def test_counts_add_up_over_shards_and_states(bench):
    source = CASES / "H3-counts-add-up/input.parquet"
    fed = bench.run(source, "chain-a", shards={"max_rows": 4})
    plan = fed.plan
    assert (plan.num_rows, plan.num_bad_rows, plan.num_prompt_tokens) == (10, 3, 69)
    assert plan.bad_rows_by_state == {"invalid_input": 2, "overlong": 1}
    assert sum(shard.num_rows for shard in fed.shards) == 10
    assert sum(shard.num_bad_rows for shard in fed.shards) == 3
    assert sum(shard.num_prompt_tokens for shard in fed.shards) == 69
    assert [example["row_index"] for example in plan.bad_row_examples] == [1, 3, 7]


def test_a_second_planner_adopts_the_stored_plan_and_equal_input_gives_equal_plans(tmp_path):
    plans = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        each = Bench(tmp_path / name)
        job = make_job(CASES / "H3-counts-add-up/input.parquet", shards={"max_rows": 4})
        plans.append(each.plan(job, "chain-a"))
        assert each.plan(job, "nowhere") == plans[-1]
    assert plans[0] == plans[1]
    assert dataclasses.asdict(plans[0])["table_digest"] == plans[1].table_digest
