"""Faults that users of other systems met, each through the whole pipeline, with its right value."""

import gzip
import json
import os
import shutil

import pyarrow.parquet as pq
import pytest

from tests.pipeline import CASES, Nightjar, expected


@pytest.fixture
def nightjar(tmp_path, capsys):
    return Nightjar(tmp_path, capsys)


def check_texts(found, wanted, mode="chat_template"):
    for row_id, value in wanted.items():
        right = value.get(mode, value)
        row = found[row_id]
        assert row["completion"] == right["text"], row_id
        assert row["finish_reason"] == right["finish_reason"], row_id
        assert row["num_prompt_tokens"] == right["prompt_tokens"], row_id


@pytest.mark.parametrize("batch", [1, 8])
def test_batched_text_equals_text_alone(nightjar, batch):
    case = "A1-left-pad"
    done = nightjar.run("tiny-a", CASES / case / "input.parquet", engine__max_num_seqs=batch)
    assert done.code == 0
    check_texts(done.by_id(), expected(case)["per_id"])


def test_raw_prompts_go_in_without_a_template_when_asked(nightjar):
    case = "A1-left-pad"
    done = nightjar.run("tiny-a", CASES / case / "input.parquet", input__chat_template="none")
    check_texts(done.by_id(), expected(case)["per_id"], "raw_prompt")


def test_output_keeps_input_order_and_columns_after_length_sorting(nightjar):
    case = "A2-order-after-sort"
    wanted = expected(case)
    source = pq.read_table(CASES / case / "input.parquet")
    done = nightjar.run(
        "tiny-a", CASES / case / "input.parquet", engine__max_num_seqs=5, shards__max_rows=10
    )
    assert [row["id"] for row in done.rows] == wanted["ids_in_this_order"]
    assert [row["row_index"] for row in done.rows] == list(range(37))
    for name in source.column_names:
        assert done.table.column(name).combine_chunks() == source.column(name).combine_chunks()
    check_texts(done.by_id(), wanted["per_id"])


def test_an_id_draws_the_same_in_another_order_and_in_a_subset(nightjar):
    folder = CASES / "A3-seed-and-order"
    texts = []
    for name in ("input", "input_reversed", "input_subset"):
        done = nightjar.run(
            "tiny-a",
            folder / f"{name}.parquet",
            input__id_column="id",
            sampling__temperature=0.9,
            sampling__seed=1234,
            engine__max_num_seqs=4,
        )
        texts.append({i: row["completion"] for i, row in done.by_id().items()})
    whole, turned, subset = texts
    assert whole == turned
    assert subset.items() <= whole.items()
    assert len(set(whole.values())) > 1


def test_later_files_in_one_process_are_as_good_as_the_first(nightjar):
    case = "A4-three-files-one-process"
    done = nightjar.run("chain-a", CASES / case / "input", shards__max_rows=5)
    assert len(done.rows) == 15
    check_texts(done.by_id(), expected(case)["per_id"])


def test_one_overlong_prompt_is_one_row_with_length_and_limit(nightjar):
    case = "B1-one-long-row"
    wanted = expected(case)
    done = nightjar.run("tiny-a", CASES / case / "input.parquet", engine__max_num_seqs=4)
    assert done.code == 0
    rows = done.by_id()
    assert len(rows) == 9
    assert rows["b1-4"]["state"] == "overlong"
    assert rows["b1-4"]["num_prompt_tokens"] == wanted["prompt_tokens_b1-4"]
    assert "988" in rows["b1-4"]["error"]
    assert "256" in rows["b1-4"]["error"]
    check_texts(rows, wanted["per_id"])


def test_max_length_of_the_model_files_cuts_nothing(nightjar):
    case = "B2-max-length-in-model"
    done = nightjar.run("chain-a-maxlen20", CASES / case / "input.parquet", sampling__max_tokens=12)
    assert {row["num_completion_tokens"] for row in done.rows} == {12}
    assert {row["finish_reason"] for row in done.rows} == {"length"}
    assert {row["state"] for row in done.rows} == {"truncated"}


@pytest.mark.parametrize("name", ["input.parquet", "input.jsonl"])
def test_null_and_blank_prompts_spoil_no_other_row(nightjar, name):
    case = "C1-null-and-empty"
    wanted = expected(case)
    done = nightjar.run("chain-a", CASES / case / name)
    rows = done.by_id()
    assert len(rows) == 8
    assert rows["c1-1"]["state"] == "invalid_input"
    assert rows["c1-1"]["completion"] is None
    check_texts(rows, wanted["per_id"])
    if name.endswith("jsonl"):
        assert rows["c1-2"]["state"] == "invalid_input"


@pytest.mark.parametrize("batch", [1, 4])
def test_rows_after_a_bad_one_do_not_shift(nightjar, batch):
    case = "C2-no-shift-after-failure"
    wanted = expected(case)
    source = pq.read_table(CASES / case / "input.parquet").to_pylist()
    done = nightjar.run("chain-a", CASES / case / "input.parquet", engine__max_num_seqs=batch)
    rows = done.by_id()
    bad = [row["id"] for row in done.rows if row["state"] == "invalid_input"]
    assert bad == wanted["error_rows"]
    assert {row["id"]: row["check"] for row in source} == {
        i: row["check"] for i, row in rows.items()
    }
    check_texts(rows, wanted["per_id"])


def test_half_a_surrogate_pair_spoils_only_its_row_and_output_is_utf8(nightjar):
    case = "C3-lone-surrogate"
    done = nightjar.run("chain-a", CASES / case / "input.jsonl")
    rows = done.by_id()
    assert len(rows) == 4
    check_texts(rows, expected(case)["per_id"])
    for column in done.table.columns:
        for chunk in column.chunks:
            chunk.validate(full=True)


def test_one_begin_token_per_prompt(nightjar):
    case = "D1-double-bos"
    done = nightjar.run("tiny-a-bos", CASES / case / "input.parquet")
    check_texts(done.by_id(), expected(case)["per_id"])


def test_a_tool_result_never_vanishes_from_the_prompt(nightjar):
    case = "D2-tool-content-object"
    wanted = expected(case)
    done = nightjar.run("tiny-a", CASES / case / "input.jsonl", input__messages_column="messages")
    rows = done.by_id()
    check_texts(rows, wanted["per_id"])
    for row_id, tokens in wanted["prompt_tokens_if_json_text"].items():
        assert rows[row_id]["num_prompt_tokens"] == tokens


@pytest.mark.parametrize(
    ("name", "column"), [("messages.jsonl", "messages"), ("prompts.parquet", None)]
)
def test_a_model_without_chat_template_is_refused_once_with_the_remedy(nightjar, name, column):
    settings = {"input__messages_column": column} if column else {}
    done = nightjar.run("tiny-a-nochat", CASES / "D3-no-chat-template" / name, **settings)
    assert done.code == 2
    assert "chat template" in done.err
    assert "input.chat_template" in done.err
    assert not list(nightjar.folder.glob("out/*/completions/*"))


def test_raw_prompts_need_no_chat_template(nightjar):
    case = "D3-no-chat-template"
    done = nightjar.run(
        "tiny-a-nochat", CASES / case / "prompts.parquet", input__chat_template="none"
    )
    check_texts(done.by_id(), expected(case)["per_id_raw"])


def test_the_thinking_switch_reaches_the_template_and_makes_another_run(nightjar):
    case = "D4-thinking-off"
    wanted = expected(case)
    runs = set()
    for is_on, key in ((False, "run_1_per_id"), (True, "run_2_per_id")):
        done = nightjar.run(
            "tiny-a",
            CASES / case / "input.jsonl",
            input__messages_column="messages",
            input__chat_template_kwargs={"enable_thinking": is_on},
        )
        runs.add(done.run)
        rows = done.by_id()
        for row_id, right in wanted[key].items():
            assert rows[row_id]["num_prompt_tokens"] == right["prompt_tokens"]
            assert (rows[row_id]["reasoning"] or "") + (rows[row_id]["completion"] or "") == right[
                "text"
            ]
    assert len(runs) == 2


@pytest.mark.parametrize("name", ["clean.jsonl", "null_filled.parquet"])
def test_null_keys_of_other_rows_never_reach_the_prompt(nightjar, name):
    case = "D5-null-filled-structs"
    done = nightjar.run(
        "tiny-a",
        CASES / case / name,
        input__messages_column="messages",
        input__tools_column="tools",
    )
    check_texts(done.by_id(), expected(case)["both_runs_per_id"])


def test_a_switch_the_template_never_reads_is_said_once(nightjar):
    case = "D9-template-without-switch"
    done = nightjar.run(
        "tiny-a-nothink",
        CASES / case / "input.jsonl",
        input__messages_column="messages",
        input__chat_template_kwargs={"enable_thinking": False},
    )
    assert done.err.count("enable_thinking") == 1
    check_texts(done.by_id(), expected(case)["per_id"])


def test_a_stop_string_over_several_tokens_ends_the_text_before_it(nightjar):
    case = "E1-stop-across-tokens"
    wanted = expected(case)
    done = nightjar.run("chain-a", CASES / case / "input.parquet", sampling__stop=["END"])
    rows = done.by_id()
    assert {i: row["completion"] for i, row in rows.items()} == wanted["text"]
    assert {i: row["finish_reason"] for i, row in rows.items()} == wanted["finish_reason"]


@pytest.mark.parametrize(
    ("case", "model"),
    [("E2-eos-list", "chain-a"), ("E7-eos-missing-in-model-file", "chain-a-geneos")],
)
def test_every_end_token_ends(nightjar, case, model):
    done = nightjar.run(model, CASES / case / "input.parquet")
    wanted = expected(case)["text"]
    texts = {i: row["completion"] for i, row in done.by_id().items()}
    assert texts == wanted if isinstance(wanted, dict) else set(texts.values()) == {wanted}
    assert {row["finish_reason"] for row in done.rows} == {"stop"}


@pytest.mark.parametrize("max_tokens", [8, 3])
def test_a_character_of_four_tokens_is_never_broken(nightjar, max_tokens):
    case = "E3-emoji-over-four-tokens"
    done = nightjar.run("chain-a", CASES / case / "input.parquet", sampling__max_tokens=max_tokens)
    text = done.rows[0]["completion"]
    text.encode("utf-8")
    if max_tokens == 8:
        assert text == "Fox \U0001f98a!"
    else:
        assert "Fox " in text
        assert done.rows[0]["finish_reason"] == "length"


def test_only_new_text_is_in_the_completion(nightjar):
    case = "E4-only-new-text"
    done = nightjar.run("tiny-a", CASES / case / "input.parquet", engine__max_num_seqs=6)
    check_texts(done.by_id(), expected(case)["per_id"])


def test_per_row_parameters_are_honoured(nightjar):
    case = "E5-row-parameters"
    done = nightjar.run("chain-a", CASES / case / "input.parquet", engine__max_num_seqs=4)
    assert {i: row["completion"] for i, row in done.by_id().items()} == expected(case)["text"]


@pytest.mark.parametrize(
    ("case", "name"), [("F1-bom-csv", "input.csv"), ("F2-csv-multiline", "input.csv")]
)
def test_csv_with_bom_and_line_breaks_reads_whole(nightjar, case, name):
    case = next(path.name for path in CASES.glob(case.split("-")[0] + "-*"))
    done = nightjar.run("chain-a", CASES / case / name)
    wanted = expected(case)
    assert len(done.rows) == wanted["rows_out"]
    check_texts(done.by_id(), wanted["per_id"])


def test_large_integer_ids_come_back_exactly(nightjar):
    case = next(path.name for path in CASES.glob("F3-*"))
    wanted = expected(case)
    done = nightjar.run("chain-a", CASES / case / "input.parquet")
    assert str(done.table.schema.field("id").type) == wanted["id_type"]
    assert [row["id"] for row in done.rows] == wanted["ids_exact"]
    assert [row["completion"] for row in done.rows] == wanted["texts_in_order"]


def test_marker_and_hidden_files_in_a_folder_are_no_input(nightjar):
    case = "F4-folder-with-extras"
    done = nightjar.run("chain-a", CASES / case / "input")
    wanted = expected(case)
    assert len(done.rows) == wanted["rows_out"]
    check_texts(done.by_id(), wanted["per_id"])


@pytest.mark.parametrize("name", ["zero_rows.parquet", "empty.jsonl", "header_only.csv"])
def test_an_input_without_rows_ends_cleanly(nightjar, name):
    done = nightjar.run("chain-a", CASES / "F5-no-rows" / name)
    assert done.code in (0, 2), done.err
    assert "Traceback" not in done.err
    if done.code == 0:
        assert done.document["num_rows"] == 0
        assert done.document["is_published"]
        assert nightjar.call("verify", str(done.run)).code == 0


def test_rows_that_say_nothing_are_answers_and_receipts_are_strict_json(nightjar):
    done = nightjar.run("chain-a", CASES / "F5-no-rows" / "all_silent.parquet")
    assert [row["completion"] for row in done.rows] == ["", ""]
    assert {row["finish_reason"] for row in done.rows} == {"stop"}

    def refuse(constant):
        raise AssertionError(constant)

    for path in [*done.run.rglob("*.json")]:
        json.loads(path.read_text(), parse_constant=refuse)


def test_a_repeated_custom_id_is_refused_naming_id_and_lines(nightjar):
    case = "F6-duplicate-custom-id"
    uri = CASES / case / "input.jsonl"
    done = nightjar.run("chain-a", uri, input__format="openai-batch")
    assert done.code == 2
    assert "f6-a" in done.err
    for line in ("1", "3", "5"):
        assert line in done.err
    allowed = nightjar.run(
        "chain-a", uri, input__format="openai-batch", input__on_duplicate_id="allow"
    )
    assert [row["completion"] for row in allowed.rows] == expected(case)["texts_by_line"]


def test_a_changed_file_under_the_same_name_size_and_time_is_another_input(nightjar):
    case = "F7-file-changed-same-name"
    wanted = expected(case)
    target = nightjar.folder / "prompts.jsonl"
    for version, key in (("v1", "run_1_text"), ("v2", "run_2_text")):
        shutil.copyfile(CASES / case / version / "prompts.jsonl", target)
        os.utime(target, (1_767_225_600, 1_767_225_600))
        done = nightjar.run("chain-a", target)
        assert {i: row["completion"] for i, row in done.by_id().items()} == wanted[key]


def test_an_explicit_run_id_with_changed_input_is_refused_with_both_etags(nightjar):
    case = "F7-file-changed-same-name"
    target = nightjar.folder / "prompts.jsonl"
    shutil.copyfile(CASES / case / "v1" / "prompts.jsonl", target)
    assert nightjar.run("chain-a", target, run_id="r").code == 0
    shutil.copyfile(CASES / case / "v2" / "prompts.jsonl", target)
    done = nightjar.run("chain-a", target, run_id="r")
    assert done.code == 2
    assert "ETag" in done.err


@pytest.mark.parametrize("packed", [True, False])
def test_a_line_of_three_megabytes_is_one_row(nightjar, packed):
    case = next(path.name for path in CASES.glob("F9-*"))
    wanted = expected(case)
    source = CASES / case / "input.jsonl.gz"
    if not packed:
        plain = nightjar.folder / "input.jsonl"
        plain.write_bytes(gzip.decompress(source.read_bytes()))
        source = plain
    rows = nightjar.run("chain-a", source).by_id()
    assert {i: row["completion"] for i, row in rows.items()} == wanted["text"]
    assert len(rows["f9-0"]["note"]) == wanted["note_kept_length"]["f9-0"]


def test_shards_never_overwrite_each_other_and_running_again_changes_nothing(nightjar):
    case = "G3-shards-do-not-overwrite"
    wanted = expected(case)["text_for_prompt"]
    uri = CASES / case / "input"
    first = nightjar.run("chain-a", uri, shards__max_rows=20, hardware__replicas=2)
    before = {path: path.read_bytes() for path in first.run.rglob("part-*")}
    again = nightjar.run("chain-a", uri, shards__max_rows=20, hardware__replicas=2)
    other_cut = nightjar.run("chain-a", uri, shards__max_rows=70)
    for done in (first, again, other_cut):
        assert done.code == 0
        rows = done.by_id()
        assert len(rows) == 200
        assert all(row["completion"] == wanted[row["prompt"]] for row in rows.values())
    assert {path: path.read_bytes() for path in first.run.rglob("part-*")} == before


def test_a_stored_part_that_lost_rows_is_put_back_by_running_again(nightjar):
    case = "G4-old-part-has-fewer-rows"
    uri = CASES / case / "input.parquet"
    done = nightjar.run("chain-a", uri, shards__max_rows=10)
    part = sorted(done.run.glob("completions/*.parquet"))[-1]
    table = pq.read_table(part)
    pq.write_table(table.slice(0, table.num_rows - 3), part)
    assert nightjar.call("verify", str(done.run)).code == 4
    again = nightjar.run("chain-a", uri, shards__max_rows=10)
    assert again.code == 0
    assert len(again.by_id()) == 30
    assert nightjar.call("verify", str(done.run)).code == 0


def test_a_damaged_plan_is_named(nightjar):
    uri = CASES / "G4-old-part-has-fewer-rows" / "input.parquet"
    done = nightjar.run("chain-a", uri, shards__max_rows=10)
    plan = done.run / "plan.parquet"
    pq.write_table(pq.read_table(plan).slice(0, 2), plan)
    again = nightjar.run("chain-a", uri, shards__max_rows=10)
    assert again.code == 2
    assert "plan.parquet" in again.err


def test_other_settings_never_reuse_old_text(nightjar):
    case = "G5-settings-changed"
    uri = CASES / case / "input.parquet"
    runs = [
        nightjar.run("chain-a", uri, sampling__max_tokens=2),
        nightjar.run("chain-a", uri, sampling__max_tokens=5),
        nightjar.run("chain-a", uri, sampling__max_tokens=5, sampling__stop=["on"]),
    ]
    texts = [done.by_id()["g5-0"]["completion"] for done in runs]
    assert texts == ["go on!", "go on! on! on! on!", "go "]
    assert len({done.run for done in runs}) == 3


def test_other_settings_under_the_same_run_id_are_refused_by_field(nightjar):
    uri = CASES / "G5-settings-changed" / "input.parquet"
    assert nightjar.run("chain-a", uri, sampling__max_tokens=2, run_id="mine").code == 0
    done = nightjar.run("chain-a", uri, sampling__max_tokens=5, run_id="mine")
    assert done.code == 2
    assert "sampling.max_tokens was 2, now 5" in done.err


def test_a_broken_input_file_is_refused_before_any_shard_by_name(nightjar):
    done = nightjar.run("chain-a", CASES / "H1-poison-shard" / "input", shards__max_rows=5)
    assert done.code == 2
    assert "part-2.parquet" in done.err
    assert not list(nightjar.folder.glob("out/*/completions/*"))


def test_a_broken_input_file_can_become_error_rows(nightjar):
    case = "H1-poison-shard"
    done = nightjar.run(
        "chain-a",
        CASES / case / "input",
        shards__max_rows=5,
        input__on_bad_file="skip_with_error_rows",
    )
    assert done.code == 0
    good = expected(case)["per_id"]
    rows = done.rows
    check_texts({row["id"]: row for row in rows if row["id"]}, good)
    bad = [row for row in rows if row["state"] == "invalid_input"]
    assert bad
    assert all("part-2.parquet" in row["error"] for row in bad)


def test_counts_add_up_after_a_run_and_after_another(nightjar):
    case = "H3-counts-add-up"
    wanted = expected(case)
    for _ in range(2):
        done = nightjar.run("chain-a", CASES / case / "input.parquet", shards__max_rows=4)
        states = done.document["rows_by_state"]
        assert sum(states.values()) == wanted["after_each_run"]["rows_total"]
        answered = states.get("ok", 0) + states.get("truncated", 0)
        assert answered == wanted["after_each_run"]["rows_ok"]
        assert done.document["num_failed_rows"] == wanted["after_each_run"]["rows_failed"]
        assert (
            done.document["num_completion_tokens"] == wanted["new_tokens_ok_rows_without_end_token"]
        )
        assert done.document["num_prompt_tokens"] == wanted["prompt_tokens_ok_rows"]
        receipts = [json.loads(p.read_text()) for p in (done.run / "metrics").glob("*.json")]
        assert sum(receipt["num_rows"] for receipt in receipts) == 10


def test_a_missing_weight_file_stops_once_by_name(nightjar):
    done = nightjar.run("tiny-a-missing-shard", CASES / "I1-weight-file-missing" / "input.parquet")
    assert done.code == 2
    assert "model-00002-of-00003.safetensors" in done.err
    assert not list(nightjar.folder.glob("out/*/completions/*"))


@pytest.mark.parametrize("batch", [1, 5])
def test_a_tied_head_in_several_files_is_the_right_one(nightjar, batch):
    case = "I2-tied-and-sharded"
    done = nightjar.run(
        "tiny-tied-sharded", CASES / case / "input.parquet", engine__max_num_seqs=batch
    )
    check_texts(done.by_id(), expected(case)["per_id"])


def test_sampling_hidden_in_the_model_is_not_used_and_the_real_one_recorded(nightjar):
    case = "I3-sampling-on-in-model"
    done = nightjar.run("tiny-a-sampling", CASES / case / "input.parquet")
    check_texts(done.by_id(), expected(case)["runs_1_2_per_id"])
    record = json.loads((done.run / "run.json").read_text())
    assert record["fingerprint_fields"]["sampling.temperature"] == 0.0
    assert record["fingerprint_fields"]["sampling.top_k"] == 0


def test_more_replicas_than_rows_end_with_the_row(nightjar, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"id": "i4-0", "prompt": "Say 8"}\n')
    done = nightjar.run("none", path, hardware__replicas=3, engine__backend="dummy")
    assert done.code == 0, done.err
    assert [row["id"] for row in done.rows] == ["i4-0"]
    assert len(list(done.run.glob("completions/*"))) == 1
