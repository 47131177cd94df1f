"""Files dropped into an inbox: judged by letter, moved on, worked on once."""

import json
import os
import time
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows.cli import main
from flows.inbox_jobs import InboxJobs
from storage.object_store import open_store
from tasks.inbox import KEEP, scan, submit

NOW = datetime(2026, 11, 25, 18, 0, tzinfo=UTC)


class Inbox:
    """A folder with an inbox job, and what a test does with it."""

    def __init__(self, folder):
        self.folder = folder
        self.store = open_store(str(folder / "box"))
        self.job = folder / "inbox.yaml"
        base = {
            "name": "inbox",
            "model": {"source": "none"},
            "input": {"prompt": "Say: {prompt}", "id_column": "id"},
            "output": {"uri": str(folder / "results")},
            "sampling": {"max_tokens": 8},
            "engine": {"backend": "dummy"},
        }
        self.job.write_text(yaml.safe_dump(base))

    def drop(self, name, prompts, ids=None, age_s=60):
        path = self.folder / "box" / "inbox" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"id": ids or list(range(len(prompts))), "prompt": prompts})
        pq.write_table(table, path)
        self.age(path, age_s)
        return path

    def age(self, path, age_s):
        os.utime(path, (time.time() - age_s,) * 2)

    def scan(self, **changes):
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        jobs = InboxJobs.read(str(self.job))
        return scan(self.store, storage=jobs.storage, jobs=jobs, work_dir=work, now=NOW, **changes)

    def names(self):
        return sorted(info.key for info in self.store.list() if info.key != KEEP)

    def letter(self, state):
        (key,) = [k for k in self.names() if k.startswith(f"{state}/") and k.endswith(".json")]
        return json.loads(self.store.get(key))


@pytest.fixture
def inbox(tmp_path):
    return Inbox(tmp_path)


def test_a_good_file_gets_a_letter_and_a_job_that_publishes_and_is_then_done(inbox):
    inbox.drop("night.parquet", ["one", "two", None, "one"])
    found = inbox.scan()
    assert found.accepted == ["night.parquet"]
    letter = inbox.letter("accepted")
    told = letter["preflight"]
    assert told["num_rows"] == 4
    assert told["bad_rows_by_state"] == {"invalid_input": 1}
    assert [row["row_index"] for row in told["bad_row_examples"]] == [2]
    assert told["num_repeated_prompts"] == 1
    assert told["first_prompt"] == "<|user|>Say: one\n<|assistant|>"
    assert told["forecast"]["starts_at"].startswith("2026-11-25T18:00:00")
    (submission,) = found.queued
    assert submission.after is None
    folder = f"accepted/{submission.submission_id}/"
    names = ["job.yaml", "night.parquet", "preflight.json", "preflight.md"]
    assert inbox.names() == [folder + name for name in names]
    text = inbox.store.get(f"{folder}preflight.md").decode()
    assert "      row 2: invalid_input: " in text
    assert "    forecast   finish: not known" in text
    assert "accepted" in text.splitlines()[0]

    assert main(["run", submission.job_uri, "--json"]) == 0
    found = inbox.scan()
    assert (found.done, found.queued) == ([submission.submission_id], [])
    result = json.loads(inbox.store.get(f"done/{submission.submission_id}/result.json"))
    assert result["run"] == letter["run_uri"]
    assert main(["verify", result["run"], "--json"]) == 0
    assert inbox.scan().done == []


def test_the_same_file_twice_is_one_submission_and_another_content_is_another(inbox):
    inbox.drop("night.parquet", ["one"])
    (first,) = inbox.scan().queued
    before = inbox.names()
    assert (inbox.folder / "box" / "inbox").is_dir(), "the next file can be copied into it"
    inbox.drop("night.parquet", ["one"])
    assert inbox.scan().queued == [first]
    assert inbox.names() == before
    inbox.drop("night.parquet", ["another"])
    assert len(inbox.scan().queued) == 2


@pytest.mark.parametrize(
    ("prompts", "ids", "why"),
    [
        ([None, None], None, "None of its 2 rows can be used"),
        ([], [], "There are no rows"),
        (["one", "two"], [7, 7], "7"),
    ],
)
def test_a_file_without_any_use_is_rejected_and_told_why(inbox, prompts, ids, why):
    inbox.drop("bad.parquet", prompts, ids)
    found = inbox.scan()
    assert (found.rejected, found.queued) == (["bad.parquet"], [])
    assert why in inbox.letter("rejected")["reason"]
    assert not [key for key in inbox.names() if key.startswith("inbox/")]


def test_a_broken_file_is_rejected_and_its_repaired_copy_accepted(inbox):
    path = inbox.drop("night.parquet", ["one"])
    path.write_bytes(path.read_bytes()[:-20])
    inbox.age(path, 60)
    assert inbox.scan().rejected == ["night.parquet"]
    assert "night.parquet" in inbox.letter("rejected")["reason"]
    inbox.drop("night.parquet", ["one"])
    assert inbox.scan().accepted == ["night.parquet"]


def test_a_file_that_is_being_written_is_left_alone_and_hidden_ones_are_never_looked_at(inbox):
    half = inbox.drop("half.parquet", ["one"], age_s=0)
    inbox.drop(".upload.parquet", ["one"])
    inbox.drop("_tmp/part.parquet", ["one"])
    (inbox.folder / "box" / "inbox" / "notes.txt").write_text("hello")
    before = inbox.names()
    assert inbox.scan().waiting == ["half.parquet"]
    assert inbox.names() == before
    inbox.age(half, 60)
    assert inbox.scan().accepted == ["half.parquet"]


def test_settings_beside_a_file_go_over_the_inbox_s_own_and_may_say_when(inbox, tmp_path):
    source = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"id": [1], "text": ["one"]}), source)
    settings = {"input": {"prompt": "Shout: {text}"}, "sampling": {"max_tokens": 3}}
    submit(inbox.store, source, settings=settings, after="20:00 Europe/Berlin")
    inbox.age(tmp_path / "box" / "inbox" / "mine.parquet", 60)
    (submission,) = inbox.scan().queued
    assert "Shout: one" in inbox.letter("accepted")["preflight"]["first_prompt"]
    assert submission.after == NOW.replace(hour=19)
    job = yaml.safe_load(inbox.store.get(f"accepted/{submission.submission_id}/job.yaml"))
    assert job["sampling"]["max_tokens"] == 3
    assert job["input"]["id_column"] == "id"


def test_the_letter_is_the_plan_of_the_job_and_keeps_a_private_jobs_text_to_itself(inbox, tmp_path):
    inbox.drop("open.parquet", ["zanzibar", "two"])
    sidecar = inbox.drop("shut.parquet", ["zanzibar", "two"]).with_name("shut.parquet.yaml")
    sidecar.write_text("output: {private: true}\n")
    assert inbox.scan().accepted == ["open.parquet", "shut.parquet"]
    texts = {}
    for key in inbox.names():
        if key.startswith("accepted/") and "/preflight." in key:
            texts.setdefault(key.split("/")[1].split("-")[0], []).append(inbox.store.get(key))
    assert all(b"zanzibar" in text for text in texts["open"])
    assert not any(b"zanzibar" in text for text in texts["shut"])
    assert all(b"2 of 2 rows" in text for text in texts["shut"])


def test_wrong_settings_beside_a_file_reject_it_by_name_until_they_are_right(inbox):
    sidecar = inbox.drop("night.parquet", ["one"]).with_name("night.parquet.yaml")
    sidecar.write_text("smapling: {max_tokens: 3}\n")
    assert inbox.scan().rejected == ["night.parquet"]
    reason = inbox.letter("rejected")["reason"]
    assert reason == "night.parquet.yaml: smapling: unknown key; did you mean sampling?"
    inbox.drop("night.parquet", ["one"])
    assert inbox.scan().accepted == ["night.parquet"]
    assert not [key for key in inbox.names() if key.startswith("rejected/")]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("storage: {endpoint_url: 'https://elsewhere.example'}", "storage"),
        ("hardware: {provider: command, placement: {launcher: rm}}", "hardware.provider"),
        ("hardware: {placement: {env: {LD_PRELOAD: x}}}", "hardware.placement"),
        ("hardware: {stage_to: /etc}", "hardware.stage_to"),
        ("model: {allowed_code: []}", "model.allowed_code"),
        ("hardware: {stage_budget: 1}", "hardware.stage_budget"),
        ("metrics: {textfile_dir: /etc}", "metrics"),
        ("input: {uri: /etc/passwd}", "input.uri"),
        ("input: {chat_template: /etc/passwd}", "input.chat_template"),
        ("model: {source: /root}", "model.source"),
        ("model: {source: 'file:///root'}", "model.source"),
        ("output: {uri: s3://elsewhere}", "output.uri"),
        ("output: {uri: OUT-of-reach/x}", "output.uri"),
        ("output: {uri: OUT/../x}", "output.uri"),
        ("output: {history: /tmp}", "output.history"),
        ("run_id: other", "run_id"),
    ],
)
def test_what_is_the_inbox_s_own_cannot_be_set_beside_a_file(inbox, settings, named):
    sidecar = inbox.drop("night.parquet", ["one"]).with_name("night.parquet.yaml")
    sidecar.write_text(settings.replace("OUT", str(inbox.folder / "results")))
    assert inbox.scan().rejected == ["night.parquet"]
    reason = inbox.letter("rejected")["reason"]
    assert reason.startswith(f"night.parquet.yaml: {named}: ")
    assert "\n" not in reason


def test_a_place_below_the_inbox_s_own_output_may_be_asked_for(inbox):
    sidecar = inbox.drop("night.parquet", ["one"]).with_name("night.parquet.yaml")
    place = str(inbox.folder / "results" / "mine")
    sidecar.write_text(f"output: {{uri: {place}}}\nmodel: {{source: none}}\n")
    assert inbox.scan().accepted == ["night.parquet"]
    assert inbox.letter("accepted")["run_uri"].startswith(f"{place}/")


def test_a_scan_killed_before_the_file_left_the_inbox_is_repeated_without_harm(inbox):
    path = inbox.drop("night.parquet", ["one"])
    data = path.read_bytes()
    (first,) = inbox.scan().queued
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)  # as if it had not been removed
    inbox.age(path, 60)
    assert inbox.scan().queued == [first]
    assert not path.exists()


def test_submit_refuses_what_it_cannot_use_before_anything_is_dropped(inbox, tmp_path, monkeypatch):
    monkeypatch.delenv("NIGHTJAR_INBOX", raising=False)
    file = tmp_path / "f.parquet"
    pq.write_table(pa.table({"id": [1], "prompt": ["one"]}), file)
    box = str(tmp_path / "box")
    assert main(["submit", str(file)]) == 2
    assert main(["submit", str(tmp_path / "absent.parquet"), "--inbox", box]) == 2
    assert main(["submit", str(file), "--inbox", box, "--after", "8 pm"]) == 2
    assert inbox.names() == []
    assert main(["submit", str(file), "--inbox", box]) == 0
    assert inbox.names() == ["inbox/f.parquet"]


def test_a_file_is_named_after_the_night_it_was_dropped_when_the_job_says_so(inbox):
    values = yaml.safe_load(inbox.job.read_text())
    values["output"]["uri"] += "/{date}"
    inbox.job.write_text(yaml.safe_dump(values))
    inbox.drop("night.parquet", ["one"])
    inbox.scan()
    day = datetime.now(UTC).date()
    days = {str(day), str(day - timedelta(days=1))}
    assert any(f"/results/{day}/" in inbox.letter("accepted")["run_uri"] for day in days)
