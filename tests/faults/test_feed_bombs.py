"""Templates and files that want all memory or all time: they cost their row, or are refused."""

import json
import os
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inference.errors import EngineConfigError, EngineFault
from storage.errors import BadInput
from tasks import feed_process
from tasks.feed import FeedLimits
from tests.feed_bench import Bench, make_job

MiB = 1024 * 1024
QUICK = FeedLimits(memory_bytes=256 * MiB, row_cpu_s=0.5, reply_s=5)
# Harmless, unless a prompt names the attack.
LOOP = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
BOMBS = (
    "{%- set p = messages[0].content -%}"
    "{%- if p == 'loop' -%}" + LOOP + "{%- elif p == 'memory' -%}{{ 'x' * 3000000000 }}"
    "{%- else -%}{{ p }}{%- endif -%}"
)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def prompts(tmp_path, *texts):
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": list(texts)}), path)
    return path


@pytest.mark.parametrize(("attack", "said"), [("loop", "more than 0.5 s"), ("memory", "memory")])
def test_a_template_bomb_costs_only_its_row(bench, tmp_path, attack, said):
    texts = ["one", attack, "two", "three"]
    fed = bench.run(prompts(tmp_path, *texts), "tiny-a", chat_template=BOMBS, limits=QUICK)
    assert [row.state for row in fed.rows] == [None, "invalid_input", None, None]
    assert said in fed.rows[1].error
    assert [record["prompt"] for record in fed.records] == texts
    assert fed.plan.bad_rows_by_state == {"invalid_input": 1}
    assert fed.rows[3].num_prompt_tokens == len(fed.rows[3].token_ids) > 0


def test_a_template_that_is_a_bomb_for_every_row_is_refused(bench, tmp_path):
    path = prompts(tmp_path, *["loop"] * 100)
    limits = FeedLimits(row_cpu_s=0.1, max_hard_rows=3)
    with pytest.raises(EngineConfigError, match="more than 3 rows took too long"):
        bench.run(path, "tiny-a", chat_template=BOMBS, limits=limits)


@pytest.mark.parametrize("template", ["{{ 9 ** 999999999 }}"])
def test_a_template_that_cannot_even_be_compiled_is_refused(bench, tmp_path, template):
    limits = FeedLimits(memory_bytes=256 * MiB, start_s=8)
    with pytest.raises(EngineConfigError, match="template"):
        bench.run(prompts(tmp_path, "one"), "tiny-a", chat_template=template, limits=limits)


# Run in the child at its start: its tokenizer does something on a word, as native code might.
HOOK = """
import os, signal, time
import inference.prompt as p
import tasks.prepare as q
real, render = p.PromptBuilder.encode, q.RowPreparer._text

class Panic(BaseException):  # as native code's panics are raised
    pass

def encode(self, texts):
    if any("PANIC" in text for text in texts):
        raise Panic
    if any("ABORT" in text for text in texts):
        os.abort()
    if any("HANG" in text for text in texts):
        time.sleep(60)
    return real(self, texts)

def text(self, row):
    if "DIE" in row.values["prompt"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if "ONCE" in row.values["prompt"] and not os.path.exists(MARKER):
        open(MARKER, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return render(self, row)

p.PromptBuilder.encode, q.RowPreparer._text = encode, text
"""


@pytest.fixture
def hooked_child(tmp_path, monkeypatch):
    folder = tmp_path / "hook"
    folder.mkdir()
    marker = f"MARKER = {str(tmp_path / 'marker')!r}"
    (folder / "sitecustomize.py").write_text(marker + HOOK)
    environment = feed_process._environment

    def hooked(limits):
        found = environment(limits)
        return {**found, "PYTHONPATH": f"{folder}{os.pathsep}{found['PYTHONPATH']}"}

    monkeypatch.setattr(feed_process, "_environment", hooked)


@pytest.mark.usefixtures("hooked_child")
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("ABORT", "signal 6"),
        ("HANG", "more than 2 s"),
        ("DIE", "signal 9"),
        ("PANIC", "ended with code 1"),
    ],
)
def test_a_row_that_kills_or_stops_the_child_is_found_in_its_batch(bench, tmp_path, word, said):
    texts = ["a", "b", word, "c"]
    fed = bench.run(prompts(tmp_path, *texts), "tiny-a", limits=FeedLimits(reply_s=2))
    assert [row.state for row in fed.rows] == [None, None, "invalid_input", None]
    assert said in fed.rows[2].error
    assert [record["prompt"] for record in fed.records] == texts


@pytest.mark.usefixtures("hooked_child")
def test_a_child_ended_by_somebody_else_costs_no_row(bench, tmp_path):
    fed = bench.run(prompts(tmp_path, "a", "ONCE", "b"), "tiny-a")
    assert [row.state for row in fed.rows] == [None, None, None]


def test_a_page_that_wants_all_memory_refuses_its_file_by_name(bench, tmp_path):
    path = tmp_path / "bomb.parquet"
    table = pa.table({"prompt": ["x" * MiB] * 700})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, data_page_size=1 << 30)
    assert path.stat().st_size < MiB
    with pytest.raises(BadInput, match=r"bomb\.parquet"):
        bench.run(path, "tiny-a", limits=QUICK)


def test_a_bomb_among_files_can_be_error_rows(bench, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"prompt": ["a", "b"]}), folder / "0.parquet")
    table = pa.table({"prompt": ["x" * MiB] * 700})
    pq.write_table(
        table,
        folder / "1.parquet",
        compression="zstd",
        use_dictionary=False,
        data_page_size=1 << 30,
    )
    pq.write_table(pa.table({"prompt": ["c"]}), folder / "2.parquet")
    fed = bench.run(folder, "tiny-a", on_bad_file="skip_with_error_rows", limits=QUICK)
    states = [row.state for row in fed.rows]
    assert states == [None, None] + ["invalid_input"] * 700 + [None]
    assert [record["prompt"] for record in fed.records[:3]] == ["a", "b", None]
    assert fed.records[-1]["prompt"] == "c"
    assert fed.plan.bad_rows_by_state == {"invalid_input": 700}
    assert "1.parquet" in fed.rows[2].error


def test_a_text_line_that_explodes_as_objects_is_refused_by_name(bench, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "x", "v": [' + ",".join(["[]"] * 8_000_000) + "]}\n")
    limits = FeedLimits(memory_bytes=96 * MiB)
    with pytest.raises(BadInput, match=r"rows\.jsonl"):
        bench.run(path, "tiny-a", limits=limits)


def test_a_read_that_is_given_up_leaves_the_feed_usable(bench, tmp_path):
    job = make_job(prompts(tmp_path, *(str(n) * 500 for n in range(3000))))
    plan = bench.plan(job, "tiny-a")
    with bench.open(job, "tiny-a") as feed:
        for start in (0, 1500):
            next(feed.read(plan, start, 3000))
        rows = [row for batch in feed.read(plan, 100, 2100) for row in batch.rows]
    assert [row.row_index for row in rows] == list(range(100, 2100))


def test_a_child_that_does_not_start_says_so(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(feed_process.sys, "executable", "/bin/false")
    with pytest.raises(EngineFault, match="does not start"):
        bench.run(prompts(tmp_path, "x"), "tiny-a")


def test_the_child_ends_when_its_parent_is_killed(bench, tmp_path):
    job = make_job(prompts(tmp_path, "x"))
    plan = bench.plan(job, "tiny-a")
    feed = bench.open(job, "tiny-a")
    list(feed.read(plan, 0, 1))
    child = feed._process._child
    child.stdin.close()
    assert child.wait(timeout=120) == 0
    feed.close()


def test_a_ctrl_c_to_the_process_group_leaves_the_child_working(bench, tmp_path):
    job = make_job(prompts(tmp_path, "x"))
    plan = bench.plan(job, "tiny-a")
    with bench.open(job, "tiny-a") as feed:
        list(feed.read(plan, 0, 1))
        child = feed._process._child
        assert os.getpgid(child.pid) != os.getpgid(0)
        os.kill(child.pid, signal.SIGINT)
        assert len(list(feed.read(plan, 0, 1))) == 1
        assert feed._process._child is child


def test_errors_of_rows_hold_no_prompt_text(bench, tmp_path):
    rows = [{"prompt": "secret \ud835 words"}, {"prompt": "secret " * 300}, {"prompt": "fine"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    fed = bench.run(path, "tiny-a")
    assert [row.state for row in fed.rows] == ["invalid_input", "overlong", None]
    assert "secret" not in json.dumps([row.error for row in fed.rows])
    assert b"secret" not in fed.plan.to_json()


def test_another_tasks_package_in_the_current_folder_is_not_taken(bench, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    assert len(bench.run(prompts(tmp_path, "x"), "tiny-a").rows) == 1
