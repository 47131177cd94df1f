"""report.html: what it shows, what it keeps to itself, and that a browser can draw it."""

import json
import re
import shutil
import subprocess

import pytest

from tasks.report_facts import error_kind
from tests.pipeline import Nightjar

SECRET = "<b>zanzibar</b>"


@pytest.fixture
def nightjar(tmp_path, capsys):
    return Nightjar(tmp_path, capsys)


def run_job(nightjar, tmp_path, **changes):
    texts = [f"{SECRET} {n}" if n % 9 else None for n in range(90)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {
        "input__prompt": "{text}",
        "engine__backend": "dummy",
        "shards__max_rows": 20,
        "hardware__price_per_hour": 2.0,
        "sampling__max_tokens": 64,
        **changes,
    }
    done = nightjar.run("tiny-a", path, **settings)
    assert done.code == 0, done.err
    return done.run


def test_publishing_draws_one_page_that_needs_nothing_else(nightjar, tmp_path):
    page = (run_job(nightjar, tmp_path) / "report.html").read_text()
    assert "published" in page
    assert re.search(r"<td>invalid_input</td><td class=\"number\">10</td>", page)
    assert "column &#39;...&#39; is null" in page
    assert re.search(r"tokens/s per replica; the largest loss, \d+ %, was ", page)
    assert page.count("<figure>") == 4
    assert page.count("<pre>") == 10
    assert "$0.00" in page
    # Namespaces and the doctype are names, not addresses.
    addresses = re.findall(r"(?:src|href)=\"([^\"#]*)\"", page)
    assert [a for a in addresses if a] == []
    assert "<script" not in page
    assert "zanzibar" not in page, "prompts are not shown"


def test_a_private_job_shows_counts_and_no_text(nightjar, tmp_path):
    run = run_job(nightjar, tmp_path, output__private=True)
    page = (run / "report.html").read_text()
    assert "<pre>" not in page
    assert "output.private" in page
    assert "invalid_input" in page


def test_a_report_can_be_drawn_again_and_kept_elsewhere(nightjar, tmp_path):
    run = run_job(nightjar, tmp_path)
    (run / "report.html").unlink()
    called = nightjar.call("report", str(run), "--out", str(tmp_path / "page.html"), "--json")
    assert called.code == 0
    assert (tmp_path / "page.html").read_bytes() == (run / "report.html").read_bytes()


def test_a_folder_that_is_no_run_is_refused(nightjar, tmp_path):
    called = nightjar.call("report", str(tmp_path))
    assert called.code == 2
    assert "no run.json" in called.err


def test_kinds_of_error_leave_values_out():
    assert error_kind("prompt length is 4,129 tokens, the limit is 128") == (
        "prompt length is N tokens, the limit is N"
    )
    assert error_kind("column 'name' is null") == "column '...' is null"
    assert error_kind(None) == "no reason given"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_draws_the_page_without_asking_for_anything(nightjar, tmp_path):
    run = run_job(nightjar, tmp_path)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    done = subprocess.run(
        [
            "chromium",
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=500,800",
            "--dump-dom",
            f"file://{run / 'report.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Completion lengths" in done.stdout
    assert done.stdout.count("<svg") == 4
