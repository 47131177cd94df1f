"""What a plan refuses and promises, and that a feed gives exactly the planned rows back."""

import dataclasses
import datetime
import gzip
import json
import shutil
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from storage import keys
from storage.errors import BadInput, CorruptObject, FingerprintMismatch
from storage.manifest import PlanManifest
from tasks.feed import input_schema
from tasks.plan import make_plan
from tasks.run_record import load_plan, load_shards
from tests.feed_bench import MODELS, RECORD, Bench, make_job

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "in"
    path.mkdir()
    return path


def put(folder, name, **columns):
    pq.write_table(pa.table(columns), folder / name)


def test_columns_come_back_bit_for_bit(bench, folder):
    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "big": pa.array([2**63 - 1, None, -(2**63)], pa.int64()),
            "when": pa.array([10**18 + 1, None, 0], pa.timestamp("ns", "Europe/Berlin")),
            "nested": pa.array([[{"x": 1, "y": None}], None, []]),
            "kind": pa.array(["p", "q", "p"]).dictionary_encode(),
            "raw": pa.array([b"\xff", None, b""]),
            "day": pa.array([datetime.date(2026, 1, 1)] * 3),
            "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int8())),
        }
    )
    pq.write_table(table, folder / "a.parquet", row_group_size=2)
    fed = bench.run(folder, "tiny-a")
    columns = pa.Table.from_batches([batch.columns for batch in fed.batches])
    assert columns.equals(table)
    assert input_schema(fed.plan).equals(columns.schema)


def test_any_rows_of_a_plan_can_be_read_alone(bench, folder):
    for part in range(3):
        put(folder, f"{part}.parquet", prompt=[f"{part}-{n}" for n in range(40)])
    job = make_job(folder)
    plan = bench.plan(job, "tiny-a")
    with bench.open(job, "tiny-a") as feed:
        for start, end in ((0, 120), (39, 41), (79, 81), (5, 6), (50, 50), (30, 100)):
            batches = list(feed.read(plan, start, end))
            rows = [row for batch in batches for row in batch.rows]
            assert [row.row_index for row in rows] == list(range(start, end))
            found = [r["prompt"] for batch in batches for r in batch.columns.to_pylist()]
            assert found == [f"{n // 40}-{n % 40}" for n in range(start, end)]
        with pytest.raises(ValueError, match="not in the plan's 120 rows"):
            next(feed.read(plan, 0, 121))


def test_the_same_rows_as_jsonl_csv_and_parquet_give_the_same_tokens(tmp_path):
    prompts = ["one", "two, three", 'say "four"', "l\u00edne\nfive"]
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    quoted = "".join('"' + prompt.replace('"', '""') + '"\r\n' for prompt in prompts)
    forms = {
        "a.parquet": None,
        "a.jsonl": lines.encode(),
        "a.jsonl.gz": gzip.compress(lines.encode()),
        "a.jsonl.zst": zstandard.compress(lines.encode()),
        "a.csv": b"prompt\r\n" + quoted.encode(),
    }
    found = {}
    for name, data in forms.items():
        path = tmp_path / "in" / name
        if data is None:
            pq.write_table(pa.table({"prompt": prompts}), path)
        else:
            path.write_bytes(data)
        (tmp_path / name).mkdir()
        fed = Bench(tmp_path / name).run(path, "tiny-a")
        found[name] = [list(row.token_ids) for row in fed.rows]
        assert [record["prompt"] for record in fed.records] == prompts
    assert all(tokens == found["a.parquet"] for tokens in found.values())


def test_strings_that_are_not_utf8_cost_their_row_only_where_they_are_used(bench, folder):
    def lying(*cells):
        ends = [0]
        for cell in cells:
            ends.append(ends[-1] + len(cell))
        offsets = pa.py_buffer(struct.pack(f"<{len(ends)}i", *ends))
        buffers = [None, offsets, pa.py_buffer(b"".join(cells))]
        return pa.Array.from_buffers(pa.string(), len(cells), buffers)

    put(folder, "0.parquet", prompt=lying(b"a", b"\xff", b"b"), note=lying(b"\xfe", b"x", b"y"))
    fed = bench.run(folder, "tiny-a")
    assert [row.state for row in fed.rows] == [None, "invalid_input", None]
    assert fed.records[0] == {"prompt": "a", "note": "\ufffd"}
    assert fed.plan.stats["num_replaced_values"] == 2
    for batch in fed.batches:
        batch.columns.validate(full=True)


def test_files_of_differing_schemas_become_one(bench, folder):
    put(folder, "0.parquet", prompt=pa.array(["a"]), n=pa.array([1], pa.int32()))
    put(folder, "1.parquet", n=pa.array([2], pa.int64()), prompt=pa.array(["b"], pa.large_string()))
    (folder / "2.jsonl").write_text('{"prompt": "c", "extra": true}\n')
    (folder / "3.jsonl").write_text("")
    fed = bench.run(folder, "tiny-a")
    assert fed.records == [
        {"prompt": "a", "n": 1, "extra": None},
        {"prompt": "b", "n": 2, "extra": None},
        {"prompt": "c", "n": None, "extra": True},
    ]
    assert len({batch.columns.schema for batch in fed.batches}) == 1
    assert [file.num_rows for file in fed.plan.inputs] == [1, 1, 1, 0]


def test_files_that_disagree_are_refused_naming_both(bench, folder):
    put(folder, "0.parquet", prompt=["a"], v=[1])
    put(folder, "1.parquet", prompt=["a"], v=["x"])
    with pytest.raises(BadInput, match=r"'v' is int64 in .*0\.parquet but string in .*1\.parquet"):
        bench.plan(make_job(folder), "tiny-a")


def test_messages_beside_prompts_are_refused_not_dropped(bench, folder):
    put(folder, "0.parquet", prompt=["a"])
    put(folder, "1.parquet", messages=[MESSAGES])
    with pytest.raises(BadInput, match="could both be the prompt"):
        bench.plan(make_job(folder), "tiny-a")
    with pytest.raises(BadInput, match=r"1\.parquet: no column 'prompt'.* it has: messages"):
        bench.plan(make_job(folder, prompt_column="prompt"), "tiny-a")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "{text}"}, "no column 'text'; there are: prompt, row_number"),
        ({"output": {"columns": ["nope"]}}, "output.columns: no column 'nope'"),
        ({"output": {"rename": {"nope": "x"}}}, "output.rename: no column 'nope'"),
        ({"output": {"rename": {"prompt": "state"}}}, "'prompt' would be 'state' .* output.rename"),
        ({"output": {"rename": {"prompt": "row_number"}}}, "two columns 'row_number'"),
        ({"shards": {"max_rows": 0}}, "at least 1"),
        ({"format": "csv"}, "the header has 1"),
    ],
)
def test_a_job_that_does_not_fit_its_input_is_refused(bench, folder, settings, said):
    put(folder, "0.parquet", prompt=["a"], row_number=[1])
    with pytest.raises(BadInput, match=said):
        bench.plan(make_job(folder, **settings), "tiny-a")


def test_an_input_column_named_like_a_result_is_refused_with_both_remedies(bench, folder):
    put(folder, "0.parquet", prompt=["a"], completion=["old"])
    with pytest.raises(BadInput, match=r"'completion' .*output\.rename .*output\.columns"):
        bench.plan(make_job(folder), "tiny-a")
    for output, expected in (
        ({"rename": {"completion": "old"}}, {"prompt": "a", "old": "old"}),
        ({"columns": ["prompt"]}, {"prompt": "a"}),
    ):
        again = Bench(bench.work_dir)
        assert again.run(folder, "tiny-a", output=output).records == [expected]


def test_rows_are_there_even_if_no_column_is_copied(bench, folder):
    put(folder, "0.parquet", prompt=["a", "b"])
    fed = bench.run(folder, "tiny-a", output={"columns": []})
    assert len(fed.rows) == 2
    assert fed.batches[0].columns.num_columns == 0


def test_a_template_over_columns_and_its_bad_rows(bench, folder):
    put(folder, "0.parquet", who=["Ann", None, "Bo"], n=[1, 2, 3])
    fed = bench.run(folder, "tiny-a", prompt="Hello {who}, number {n:03d}")
    plain = Bench(bench.work_dir)
    put(folder, "0.parquet", prompt=["Hello Ann, number 001", None, "Hello Bo, number 003"])
    expected = plain.run(folder, "tiny-a")
    assert [list(r.token_ids) for r in fed.rows] == [list(r.token_ids) for r in expected.rows]
    assert "'who' is null" in fed.rows[1].error


def test_bad_parameters_cost_their_row(bench, folder):
    put(folder, "0.parquet", prompt=["a"] * 4, temperature=[0.5, -1.0, None, 200.0])
    fed = bench.run(folder, "tiny-a", sampling={"temperature": 0.25})
    assert [row.state for row in fed.rows] == [None, "invalid_input", None, "invalid_input"]
    assert [row.sampling.temperature for row in fed.rows] == [0.5, 0.25, 0.25, 0.25]
    assert "temperature" in fed.rows[1].error


def test_a_lone_stop_string_of_a_job_is_one_string(bench, folder):
    put(folder, "0.parquet", prompt=["a"])
    fed = bench.run(folder, "tiny-a", sampling={"stop": "END"})
    assert [row.sampling.stop for row in fed.rows] == [("END",)]


def test_mixed_json_values_reach_the_prompt_as_they_were(bench, folder):
    rows = [
        {"prompt": "a"},
        {"prompt": 5},
        {"prompt": "b", "stop": "x"},
        {"prompt": "c", "stop": ["y"]},
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fed = bench.run(folder, "tiny-a")
    assert [row.state for row in fed.rows] == [None, "invalid_input", None, None]
    assert [row.sampling.stop for row in fed.rows] == [(), (), ("x",), ("y",)]
    assert fed.rows[0].num_prompt_tokens == fed.rows[2].num_prompt_tokens
    assert json.loads(fed.records[0]["prompt"]) == "a"


def test_openai_requests_keep_their_parameters_and_refuse_what_cannot_be(bench, folder):
    def request(custom_id, **body):
        url = "/v1/chat/completions"
        return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})

    lines = [
        request("a", messages=MESSAGES, max_tokens=3, temperature=0.5, stop=["x"]),
        request("b", messages=MESSAGES, logit_bias={"1": 2}),
        request("c", messages=[]),
        request("d", messages=MESSAGES, max_completion_tokens=4),
    ]
    (folder / "batch.jsonl").write_text("\n".join(lines))
    fed = bench.run(folder, "tiny-a")
    assert [row.state for row in fed.rows] == [None, "invalid_input", "invalid_input", None]
    assert [row.sampling.max_tokens for row in fed.rows] == [3, 8, 8, 4]
    assert (fed.rows[0].sampling.temperature, fed.rows[0].sampling.stop) == (0.5, ("x",))
    assert [row.row_key for row in fed.rows] == ["a", "b", "c", "d"]
    assert "logit_bias" in fed.rows[1].error


def test_a_saved_dataset_is_read(bench, tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"prompt": ["a", "b"], "n": [1, 2]}).save_to_disk(str(saved))
    fed = bench.run(saved, "tiny-a", format="dataset")
    assert fed.records == [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


def test_an_open_think_block_is_told_per_row(bench, folder):
    put(folder, "0.parquet", prompt=["a", "b"])
    template = "{{ messages[0].content }}{% if messages[0].content == 'a' %}<think>\n{% endif %}"
    fed = bench.run(folder, "tiny-a", chat_template=template)
    assert [row.is_thinking for row in fed.rows] == [True, False]


def test_truncated_prompts_run_and_are_counted(bench, folder):
    put(folder, "0.parquet", prompt=["word " * 300, "short"])
    fed = bench.run(folder, "tiny-a", on_overlong="truncate_left", sampling={"max_tokens": 100})
    assert [row.state for row in fed.rows] == [None, None]
    assert fed.rows[0].num_prompt_tokens == len(fed.rows[0].token_ids) == 156
    assert fed.plan.stats["num_truncated_prompts"] == 1


def damaged(folder, name):
    pq.write_table(
        pa.table({"prompt": [str(n) * 20 for n in range(3000)]}),
        folder / name,
        write_page_checksum=True,
        row_group_size=1000,
    )
    chunk = pq.ParquetFile(folder / name).metadata.row_group(1).column(0)
    data = bytearray((folder / name).read_bytes())
    data[chunk.dictionary_page_offset + chunk.total_compressed_size - 10] ^= 0xFF
    (folder / name).write_bytes(bytes(data))


def test_a_damaged_page_is_found_at_planning_by_file_and_row(bench, folder):
    damaged(folder, "1.parquet")
    with pytest.raises(BadInput, match=r"1\.parquet: damaged near row 1000 \(row group 1\)"):
        bench.plan(make_job(folder), "tiny-a")


def test_damaged_files_can_be_error_rows_in_place(bench, folder):
    put(folder, "0.parquet", prompt=["a", "b"])
    damaged(folder, "1.parquet")
    (folder / "2.parquet").write_bytes(b"PAR1 not really")
    (folder / "3.jsonl").write_text('{"prompt": "c"}\n{oops\n{"prompt": "d"}\n')
    fed = bench.run(folder, "tiny-a", on_bad_file="skip_with_error_rows")
    states = [row.state for row in fed.rows]
    bad = ["invalid_input"]
    assert states == [None, None, *bad * 3000, *bad, None, *bad, None]
    assert [row.row_index for row in fed.rows] == list(range(len(states)))
    assert fed.records[2]["prompt"] is None
    assert "1.parquet: damaged near row 1000" in fed.rows[2].error
    assert "2.parquet" in fed.rows[3002].error
    assert "line 2" in fed.rows[3004].error
    assert fed.plan.bad_rows_by_state == {"invalid_input": 3002}


def test_ids_that_repeat_across_files_are_refused_by_file_and_row(bench, folder):
    put(folder, "0.parquet", prompt=["a", "b"], key=["x", "y"])
    put(folder, "1.parquet", prompt=["c", "d", "e"], key=["z", "x", None])
    with pytest.raises(
        BadInput, match=r"key 'x' appears 2 times: .*0\.parquet row 0, .*1\.parquet row 1"
    ):
        bench.plan(make_job(folder, id_column="key"), "tiny-a")


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        (["x", None, "1"], ["x", 1, "1"]),
        ([7, None, 9], [7, 1, 9]),
        ([0.5, None, 1.0], ["0.5", 1, "1.0"]),
    ],
)
def test_row_keys_are_the_ids(bench, folder, values, keys):
    put(folder, "0.parquet", prompt=["a"] * 3, key=values)
    assert [row.row_key for row in bench.run(folder, "tiny-a", id_column="key").rows] == keys


def test_a_feed_needs_only_the_run_folder_for_converted_input(bench, folder, tmp_path):
    (folder / "a.jsonl").write_text('{"prompt": "a"}\n')
    job = make_job(folder)
    plan = bench.plan(job, "tiny-a")
    shutil.rmtree(tmp_path / "converted")
    with bench.open(job, "tiny-a") as feed:
        assert len(next(feed.read(plan, 0, 1)).rows) == 1


def test_converted_input_that_was_tampered_with_is_refused(bench, folder, tmp_path):
    (folder / "a.jsonl").write_text('{"prompt": "a"}\n')
    job = make_job(folder)
    plan = bench.plan(job, "tiny-a")
    shutil.rmtree(tmp_path / "converted")
    bench.store.put(plan.inputs[0].read_key, b"other")
    with bench.open(job, "tiny-a") as feed, pytest.raises(CorruptObject, match="was planned"):
        next(feed.read(plan, 0, 1))


def test_the_stored_plan_is_what_was_returned(bench, folder):
    put(folder, "0.parquet", prompt=["a"] * 5)
    plan = bench.plan(make_job(folder, shards={"max_rows": 2}), "tiny-a")
    assert load_plan(bench.store) == plan
    assert [s.num_rows for s in load_shards(bench.store, plan)] == [2, 2, 1]
    assert PlanManifest.from_json(plan.to_json(), source="t") == plan
    assert load_plan(Bench(bench.work_dir).store) is None


def test_whoever_plans_second_adopts_the_first_plan(bench, folder):
    put(folder, "0.parquet", prompt=["a"] * 5)
    job = make_job(folder)
    first = bench.plan(job, "tiny-a")
    other = dataclasses.replace(first, run_id="another", stats={})
    real = bench.store.put_if_absent

    def beaten(key, data):
        if key == keys.PLAN:
            bench.store.put(keys.PLAN, other.to_json())
        return real(key, data)

    bench.store.delete(keys.PLAN)
    bench.store.put_if_absent = beaten
    assert bench.plan(job, "tiny-a") == other


def test_a_plan_of_other_settings_is_not_adopted(bench, folder):
    put(folder, "0.parquet", prompt=["a"])
    job = make_job(folder)
    bench.plan(job, "tiny-a")
    with pytest.raises(FingerprintMismatch, match="fingerprint f, this job g"):
        make_plan(
            job=job,
            record=dataclasses.replace(RECORD, fingerprint="g"),
            store=bench.store,
            model_dir=MODELS / "tiny-a",
            work_dir=bench.work_dir,
            max_model_len=256,
        )


def test_a_table_that_is_not_the_plans_is_refused(bench, folder):
    put(folder, "0.parquet", prompt=["a"])
    plan = bench.plan(make_job(folder), "tiny-a")
    bench.store.put(keys.PLAN_TABLE, b"other")
    with pytest.raises(CorruptObject, match="the plan names sha256:"):
        load_shards(bench.store, plan)
    bench.store.delete(keys.PLAN_TABLE)
    with pytest.raises(CorruptObject, match="missing"):
        load_shards(bench.store, plan)


def test_progress_is_told(bench, folder):
    put(folder, "0.parquet", prompt=["a"] * 2500)
    told = []
    bench.plan(make_job(folder), "tiny-a", on_progress=lambda *numbers: told.append(numbers))
    assert told[-1] == (2500, 2500)
    assert told == sorted(told)
