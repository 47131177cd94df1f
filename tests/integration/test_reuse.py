"""`reuse_from`: answers of an earlier run are copied under equal content, and only `ok` ones."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from storage.answers import answers_key, read_answers
from storage.manifest import CommitRecord
from storage.object_store import open_store
from tests.pipeline import Nightjar

NUM_ROWS = 100


@pytest.fixture
def nightjar(tmp_path, capsys):
    return Nightjar(tmp_path, capsys)


def write(path, num_rows=NUM_ROWS, changed=(), order=None):
    ids = list(order or range(num_rows))
    lines = [
        {
            "id": f"r{n}",
            "text": f"row {n} of {'new' if n in changed else 'old'} words " * (1 + n % 4),
        }
        for n in ids
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(**changes):
    return {
        "input__prompt": "{text}",
        "input__id_column": "id",
        "engine__backend": "dummy",
        "sampling__max_tokens": 64,
        "sampling__temperature": 0.7,
        "shards__max_rows": 30,
        **changes,
    }


def receipts(run):
    commits = sorted((run / "commits").glob("*.json"))
    return [json.loads(path.read_text())["receipt"] for path in commits]


def answers(done):
    return [{k: v for k, v in row.items() if k != "attempt"} for row in done.rows]


def num_generated(run):
    return sum(receipt["num_sequences"] for receipt in receipts(run))


def states(done):
    return [row["state"] for row in done.rows]


def test_a_repeated_job_with_8_per_cent_changed_rows_generates_exactly_those(nightjar, tmp_path):
    first = nightjar.run("tiny-a", write(tmp_path / "first.jsonl"), **settings())
    good = [int(row["id"][1:]) for row in first.rows if row["state"] == "ok"]
    changed = good[10 : 10 + round(0.08 * len(good))]
    num_same = len(good) - len(changed)
    rows = write(tmp_path / "second.jsonl", changed=changed, order=good)
    reused = settings(reuse_from=str(first.run), shards__max_rows=17)
    told = nightjar.call("plan", str(nightjar.job("tiny-a", rows, **reused)), "--json").document
    assert (told["num_sequences"], told["num_reused"]) == (len(changed), num_same)
    assert told["forecast"]["num_completion_tokens_p50"] < len(changed) * 64

    second = nightjar.run("tiny-a", rows, **reused)
    assert second.code == 0, second.err
    assert num_generated(second.run) == len(changed)
    assert sum(r["num_reused_rows"] for r in receipts(second.run)) == num_same
    assert second.document["totals"]["num_reused_rows"] == num_same
    plain = nightjar.run("tiny-a", rows, **settings(output__uri=str(tmp_path / "plain")))
    assert answers(second) == answers(plain)
    assert nightjar.call("verify", str(second.run)).code == 0
    assert "of them copied from earlier runs" in (second.run / "report.html").read_text()

    # What was copied can be copied again, from whichever run; in another order, too.
    order = [n for n in reversed(good) if n not in changed]
    third = nightjar.run(
        "tiny-a", write(tmp_path / "third.jsonl", order=order), **settings(reuse_from="last")
    )
    assert third.code == 0, third.err
    assert num_generated(third.run) == 0
    wanted = {row["id"]: row["completion"] for row in plain.rows}
    assert [row["completion"] for row in third.rows] == [wanted[f"r{n}"] for n in order]
    assert nightjar.call("verify", str(third.run)).code == 0

    # `last` is the latest that is still there; a night does not fail because somebody has tidied up.
    shutil.rmtree(third.run)
    shutil.rmtree(second.run)
    job = nightjar.job("tiny-a", rows, **settings(reuse_from="last"))
    told = nightjar.call("plan", str(job), "--json").document
    assert told["num_reused"] == num_same  # of the first run


def test_truncated_rows_are_generated_again_and_so_is_what_stood_in_a_damaged_part(
    nightjar, tmp_path
):
    rows = write(tmp_path / "rows.jsonl")
    short = settings(sampling__max_tokens=24)
    first = nightjar.run("tiny-a", rows, **short)
    num_cut = states(first).count("truncated")
    assert 0 < num_cut < NUM_ROWS
    second = nightjar.run("tiny-a", rows, **short, reuse_from=str(first.run), name="again")
    assert num_generated(second.run) == num_cut
    assert answers(second) == answers(first)

    part = next((first.run / "_attempts" / "00001").glob("*/completions.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    third = nightjar.run("tiny-a", rows, **short, reuse_from=str(first.run), name="damaged")
    assert third.code == 0, third.err
    assert answers(third) == answers(first)
    assert num_generated(third.run) == num_cut + states(first)[30:60].count("ok")


def test_other_columns_shards_and_more_samples_change_no_answer(nightjar, tmp_path):
    rows = write(tmp_path / "rows.jsonl")
    first = nightjar.run("tiny-a", rows, **settings())
    num_ok = states(first).count("ok")
    more = settings(output__columns=["id"], shards__max_rows=50, sampling__n=2)
    second = nightjar.run("tiny-a", rows, **more, reuse_from=[str(first.run)])
    assert num_generated(second.run) == 2 * NUM_ROWS - num_ok
    assert sum(r["num_reused_rows"] for r in receipts(second.run)) == num_ok
    wanted = {row["id"]: row["completion"] for row in first.rows}
    for row in second.rows:
        assert (row["completion"] == wanted[row["id"]]) == (row["sample_index"] == 0)
    other = nightjar.job("tiny-a", rows, **settings(reuse_from="last", sampling__seed=1))
    assert nightjar.call("plan", str(other), "--json").document["num_reused"] == 0


def test_a_run_on_another_engine_gives_nothing_and_a_note_says_why(nightjar, tmp_path):
    rows = write(tmp_path / "rows.jsonl")
    first = nightjar.run("tiny-a", rows, **settings())
    other = settings(reuse_from=str(first.run), engine__kv_cache_dtype="fp8")
    told = nightjar.call("plan", str(nightjar.job("tiny-a", rows, **other)), "--json").document
    assert told["num_reused"] == 0
    assert any("another engine.kv_cache_dtype" in warning for warning in told["warnings"])
    absent = nightjar.job("tiny-a", rows, **settings(reuse_from=str(tmp_path / "absent")))
    refused = nightjar.call("plan", str(absent))
    assert refused.code == 2
    assert "reuse_from: " in refused.err
    assert "no run.json" in refused.err


def test_verify_finds_digests_that_are_not_those_of_the_part(nightjar, tmp_path):
    run = nightjar.run("tiny-a", write(tmp_path / "rows.jsonl"), **settings()).run
    commit = CommitRecord.from_json((run / "commits" / "00000.json").read_bytes(), source="")
    path = run / answers_key(commit)
    data = path.read_bytes()
    column = read_answers(data, sha256=commit.receipt["answers"], source="")
    assert len(column) == pq.read_table(run / "completions" / "part-00000.parquet").num_rows
    path.write_bytes(data.replace(b"PAR1", b"PAR2"))
    checked = nightjar.call("verify", str(run), "--json")
    assert checked.code == 4
    assert "answers.parquet" in checked.document["violations"][0]
    path.unlink()
    assert nightjar.call("verify", str(run), "--json").code == 0
    assert open_store(str(run)).get("manifest.json")
