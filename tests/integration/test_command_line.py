"""The command line, as shells, pipes and service managers use it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import build_parser, main
from flows.console import progress_line
from tasks.progress import Progress
from tests.fake_hub import FakeHub
from tests.fp8_checkpoints import store
from tests.int4_checkpoints import SETTINGS
from tests.model_files import folder_bytes
from tests.pipeline import MODELS, Nightjar

REPOSITORY = Path(__file__).parents[2]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


@pytest.fixture
def nightjar(tmp_path, capsys):
    return Nightjar(tmp_path, capsys)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt\none\ntwo\n")
    return path


def commands():
    return build_parser()._subparsers._group_actions[0].choices


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_of_a_command_says_what_it_is_for(name):
    for action in commands()[name]._actions:
        assert action.help, action.dest


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_default_that_is_a_choice_of_ours_is_told(name):
    for action in commands()[name]._actions:
        is_flag = action.nargs == 0
        if action.option_strings and not is_flag and action.default not in (None, [], "auto"):
            shown = f"{action.default:g}" if isinstance(action.default, float) else action.default
            assert f"default: {shown}" in action.help


def test_help_tells_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for code in ("0 ", "1 ", "2 ", "3 ", "4 ", "5 ", "130, 143"):
        assert f"\n  {code}" in out


def test_the_version_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("nightjar ")


def test_a_folder_of_runs_names_them(nightjar, prompts):
    done = nightjar.run("none", prompts, engine__backend="dummy")
    refused = nightjar.call("status", str(nightjar.folder / "out"))
    assert refused.code == 2
    assert f"give a run folder; there are {done.run}" in refused.err
    assert "such as OUTPUT_URI/RUN_ID" in nightjar.call("status", str(nightjar.folder)).err


def test_progress_tells_no_speed_before_the_first_row_is_generated():
    progress = Progress()
    progress.expect(num_rows=2, num_shards=1)
    progress.row_done("invalid_input", 0)
    assert "| no row generated yet |" in progress_line(progress.snapshot())
    progress.row_done("ok", 7)
    assert "tokens/s |" in progress_line(progress.snapshot())


def test_a_long_path_is_one_line_in_a_log(nightjar, prompts):
    folder = nightjar.folder / ("long" * 30)
    job = nightjar.job("none", prompts, engine__backend="dummy", output__uri=str(folder))
    done = nightjar.call("run", str(job))
    (run,) = (path for path in folder.iterdir() if (path / "run.json").exists())
    assert f"completions  {run}/completions/" in done.out.splitlines()
    assert f"{run} is whole" in nightjar.call("verify", str(run)).out.splitlines()


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_run_whose_caller_closed_its_streams_is_published(nightjar, prompts, closed):
    job = nightjar.job("none", prompts, engine__backend="dummy")
    script = f'exec "{sys.executable}" -m flows.cli run "{job}" {closed}'
    assert subprocess.run(["sh", "-c", script], cwd=REPOSITORY, timeout=120).returncode == 0
    assert list((nightjar.folder / "out").glob("*/manifest.json"))


def into_a_full_disk(*args, stderr=subprocess.PIPE, unbuffered=""):
    with FULL.open("w") as full:
        return subprocess.run(
            [sys.executable, "-m", "flows.cli", *args],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=full if stderr is None else stderr,
            text=True,
            timeout=120,
        )


@needs_full
@pytest.mark.parametrize(("options", "unbuffered"), [((), ""), (("--json",), "1")])
def test_a_run_whose_summary_cannot_be_written_is_published_and_says_so(
    nightjar, prompts, options, unbuffered
):
    job = nightjar.job("none", prompts, engine__backend="dummy")
    done = into_a_full_disk("run", str(job), *options, unbuffered=unbuffered)
    assert done.returncode == 0, done.stderr
    assert list((nightjar.folder / "out").glob("*/manifest.json"))
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("nightjar: "))
    assert "standard output could not be written: No space left on device" in line


@needs_full
def test_a_run_that_can_print_nothing_at_all_is_published(nightjar, prompts):
    job = nightjar.job("none", prompts, engine__backend="dummy")
    done = into_a_full_disk("run", str(job), stderr=None)
    assert done.returncode == 0
    assert list((nightjar.folder / "out").glob("*/manifest.json"))


def test_a_run_whose_reader_has_gone_is_published_and_ends_quietly(nightjar, prompts):
    job = nightjar.job("none", prompts, engine__backend="dummy")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "flows.cli", "run", str(job)]
    done = subprocess.run(
        command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert list((nightjar.folder / "out").glob("*/manifest.json"))
    assert "nightjar: " not in done.stderr
    assert "Traceback" not in done.stderr


@needs_full
def test_exit_codes_where_nothing_can_be_printed(nightjar, prompts):
    done = nightjar.run("none", prompts, engine__backend="dummy")
    damaged = shutil.copytree(done.run, nightjar.folder / "damaged")
    next(damaged.glob("completions/part-*")).unlink()
    lost = "standard output could not be written"
    for code, *args in (
        (0, "verify", str(done.run)),
        (1, "status", str(done.run), "--watch"),
        (1, "plan", str(nightjar.job("none", prompts, engine__backend="dummy")), "--json"),
        (4, "verify", str(damaged), "--json"),
        (2, "status", str(nightjar.folder), "--json"),
        (0, "--version"),
        (0, "--help"),
    ):
        found = into_a_full_disk(*args)
        assert (found.returncode, "Traceback" in found.stderr) == (code, False), found.stderr
        assert lost in found.stderr, args


def test_a_prefect_server_that_is_not_there_is_one_line_without_its_password(nightjar, prompts):
    job = nightjar.job("none", prompts, engine__backend="dummy")
    given = {"PREFECT_API_URL": "http://me:hunter2@127.0.0.1:1/api"}
    given["PREFECT_HOME"] = str(nightjar.folder / "prefect")
    for command in (["run", str(job)], ["deploy"]):
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *command],
            cwd=REPOSITORY,
            env={**os.environ, **given},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert "PREFECT_API_URL is http://127.0.0.1:1/api: no Prefect server answers" in last
        assert "Traceback" not in done.stderr
        assert "hunter2" not in done.stderr


def test_a_scratch_folder_that_cannot_be_is_one_line(nightjar, prompts, monkeypatch):
    job = nightjar.job("none", prompts, engine__backend="dummy")
    monkeypatch.setenv("NIGHTJAR_WORK_DIR", str(prompts))
    done = nightjar.call("plan", str(job))
    assert done.code == 2
    assert (
        done.err.strip()
        .splitlines()[-1]
        .endswith("File exists; set NIGHTJAR_WORK_DIR to a folder that can be written")
    )


def test_a_report_that_cannot_be_written_where_asked_says_where_it_is(nightjar, prompts):
    run = nightjar.run("none", prompts, engine__backend="dummy").run
    refused = nightjar.call("report", str(run), "--out", str(nightjar.folder / "no" / "such.html"))
    assert refused.code == 2
    assert refused.err.strip().endswith(f"the report is at {run}/report.html")


def test_with_json_every_command_prints_one_document_and_nothing_else(nightjar, prompts):
    job = str(nightjar.job("none", prompts, engine__backend="dummy"))
    run = str(nightjar.call("run", job, "--json").run)
    to = ("--to", str(nightjar.folder / "models"))
    model = str(MODELS / "tiny-a")
    calls = [
        ("plan", job),
        ("run", job),
        *((name, run) for name in ("status", "verify", "report", "retry", "drain", "gc", "cancel")),
        ("tiers", model),
        ("stage", model, *to, "--pin"),
        ("stage", "--list", *to),
        ("stage", model, *to, "--unpin"),
        ("stage", model, *to, "--evict"),
        ("gc", *to),
        ("submit", str(prompts), "--inbox", str(nightjar.folder / "night")),
    ]
    for call in calls:
        done = nightjar.call(*call, "--json")
        assert done.code == 0, (call, done.err)
        (line,) = done.out.splitlines()
        assert isinstance(json.loads(line), dict | list), call
        refused = nightjar.call(call[0], "/no/such/place", "--json")
        if call[0] != "gc" or call[1] == run:
            assert refused.code == 2, call
            assert json.loads(refused.out)["error"] in refused.err


@pytest.mark.parametrize("name", ["prompts.txt", "_prompts.csv", ".prompts.csv", "a.csv.yaml"])
def test_a_file_that_the_inbox_would_leave_there_is_not_submitted(nightjar, prompts, name):
    path = nightjar.folder / name
    path.write_bytes(prompts.read_bytes())
    refused = nightjar.call("submit", str(path), "--inbox", str(nightjar.folder / "night"))
    assert refused.code == 2
    assert f"{name}: would stay in the inbox; name it .parquet, " in refused.err
    assert not (nightjar.folder / "night").exists()


def test_a_model_on_the_hub_is_sized_by_its_config_alone(nightjar, monkeypatch, tmp_path):
    monkeypatch.setenv("NIGHTJAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "")
    with FakeHub(folder_bytes(MODELS / "tiny-a")) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        there = nightjar.call("tiers", "hf://org/model@main", "--json")
    assert there.code == 0, there.err
    assert json.loads(there.out) == json.loads(
        nightjar.call("tiers", str(MODELS / "tiny-a"), "--json").out
    )
    read = [line for line in hub.requests if "/resolve/" in line]
    assert read
    assert all(line.endswith("/config.json") for line in read)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_table_of_tiers_says_why_a_speed_is_missing(nightjar, tmp_path):
    stored = store(Path(shutil.copytree(MODELS / "tiny-a", tmp_path / "awq")), SETTINGS["awq"])
    lines = nightjar.call("tiers", str(stored)).out.splitlines()
    assert lines.count("- speed not predicted: no run with awq weights was measured") == 1
    assert next(line for line in lines if " H100 " in line).split()[-3:] == ["-", "-", "-"]


def test_a_gguf_file_that_is_not_staged_is_sized_once_it_is(nightjar, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    refused = nightjar.call("tiers", str(file))
    assert refused.code == 2
    assert f"stage it first, by `nightjar stage {file}`" in refused.err


def test_a_model_is_sized_for_a_job_as_for_the_run_that_it_becomes(nightjar, prompts):
    model = str(MODELS / "tiny-a")
    job = str(nightjar.job(model, prompts))
    before = nightjar.call("tiers", model, "--for", job, "--json")
    run = str(nightjar.call("run", job, "--json").run)
    of_job = nightjar.call("tiers", model, "--for", job, "--json")
    of_run = nightjar.call("tiers", model, "--for", run, "--json")
    assert (before.code, of_job.code, of_run.code) == (0, 0, 0)
    assert json.loads(of_job.out) == json.loads(of_run.out)
    assert json.loads(of_job.out) != json.loads(before.out)  # how long completions are is known now
    assert json.loads(before.out) != json.loads(nightjar.call("tiers", model, "--json").out)
    missing = nightjar.call("tiers", model, "--for", "no-such-job.yaml")
    assert (missing.code, "no-such-job.yaml" in missing.err) == (2, True)


def test_a_hardware_file_is_the_same_setting_of_run_plan_and_tiers(nightjar, prompts, tmp_path):
    parse = build_parser().parse_args
    for name in ("run", "plan"):
        given = parse([name, "job.yaml", "--hardware", "a: b.yaml", "--set", "run_id=x"])
        assert given.overrides == ['hardware.file="a: b.yaml"', "run_id=x"]
    file = tmp_path / "mine.yaml"
    file.write_text(
        "L4: {memory_gb: 24, bandwidth_gb_s: 300, tflops: {bfloat16: 121, float32: 30}, price_per_hour: 2}"
    )
    model = str(MODELS / "tiny-a")
    job = str(nightjar.job(model, prompts, hardware__file=str(file)))
    of_job = nightjar.call("tiers", model, "--for", job, "--json")
    rows = json.loads(of_job.out)
    assert {row["gpu"] for row in rows} == {"L4"}
    foretold = [row for row in rows if row.get("hours") is not None]
    assert foretold, rows
    assert all(row["usd"] is not None for row in foretold)
    bare = str(nightjar.job(model, prompts))
    assert (
        of_job.out
        == nightjar.call("tiers", model, "--for", bare, "--hardware", str(file), "--json").out
    )


def test_the_same_bytes_in_another_place_are_told_the_place_of_their_run(nightjar, prompts):
    assert nightjar.run("none", prompts, engine__backend="dummy").code == 0
    moved = nightjar.folder / "moved.csv"
    moved.write_bytes(prompts.read_bytes())
    refused = nightjar.run("none", moved, engine__backend="dummy")
    assert refused.code == 2
    assert f"{moved}: the same bytes as {prompts}, which this run was planned with" in refused.err
    assert nightjar.run("none", moved, engine__backend="dummy", run_id="moved").code == 0
