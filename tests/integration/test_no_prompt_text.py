"""Prompts stay where they belong: a marker planted in every cell is looked for everywhere else."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inference.backends.dummy import DummyBackend
from inference.errors import EngineFault
from storage import keys
from tests.pipeline import Finished, Nightjar

MARKER = "sesame-7f3a"
# Where rows and what they become are meant to be; `error` columns are looked at below.
ROWS = (keys.COMPLETIONS, keys.INPUTS, keys.ATTEMPTS)


@pytest.fixture
def nightjar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Nightjar:
    return Nightjar(tmp_path, capsys)


def lines(*rows: Any) -> bytes:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()


def parquet(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(columns), sink, compression="none", use_dictionary=False, write_page_checksum=True
    )
    return bytes(sink.getvalue().to_pybytes())


def openai(body: Any, custom_id: str = "a") -> dict[str, Any]:
    url = "/v1/chat/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


SAYS = {"role": "user", "content": MARKER}
LONG = MARKER * 100

INPUTS: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "good and overlong": (
        "input.parquet",
        parquet(prompt=[MARKER, LONG, None, MARKER * 2]),
        {"engine__max_model_len": 128},
    ),
    "not UTF-8": (
        "input.parquet",
        parquet(prompt=pa.array([MARKER.encode() + b"\xff", b"x"], pa.binary()).view(pa.string())),
        {},
    ),
    "a sampling column of the wrong kind": (
        "input.jsonl",
        lines(
            {"prompt": MARKER, "temperature": MARKER}, {"prompt": MARKER, "stop": [{"x": MARKER}]}
        ),
        {},
    ),
    "a template over columns": (
        "input.jsonl",
        lines({"text": MARKER, "n": 1}, {"text": None, "n": MARKER}),
        {"input__prompt": "Say {text} {n:03d}"},
    ),
    "messages that are none": (
        "input.jsonl",
        lines(
            {"messages": [{"role": MARKER, "content": MARKER}]},
            {"messages": [{"role": "user", "content": {MARKER: MARKER}}]},
            {"messages": [{"role": "user", MARKER: MARKER}]},
            {"messages": MARKER},
            {"messages": [SAYS]},
        ),
        {"input__messages_column": "messages"},
    ),
    "messages as broken text": (
        "input.parquet",
        parquet(messages=[f'[{{"role": "{MARKER}"', json.dumps([SAYS]), f'"{MARKER}"']),
        {"input__messages_column": "messages"},
    ),
    "batch requests": (
        "input.jsonl",
        lines(
            openai({"messages": [SAYS], "temperature": MARKER}),
            openai({"messages": MARKER}, "b"),
            openai({"prompt": MARKER, "max_tokens": -1, MARKER: 1}, "c"),
            openai({"messages": [SAYS], "tools": MARKER, "response_format": {"type": MARKER}}, "d"),
        ),
        {},
    ),
    "broken lines as error rows": (
        "input.jsonl",
        lines({"prompt": MARKER}, f'{{"prompt": "{MARKER}\n', f"{MARKER}\n", f'["{MARKER}"]\n'),
        {"input__on_bad_file": "skip_with_error_rows"},
    ),
    "broken lines": ("input.jsonl", lines({"prompt": MARKER}, f'{{"prompt": {MARKER}\n'), {}),
    "lines of other kinds": (
        "input.jsonl",
        lines({"prompt": MARKER}, {"prompt": {"x": MARKER}}, {"prompt": [MARKER]}, {"prompt": 3}),
        {},
    ),
    "a table with a field too many": (
        "input.csv",
        f'id,prompt\n1,{MARKER}\n2,{MARKER},{MARKER}\n3,"{MARKER}'.encode(),
        {},
    ),
    "a damaged page": (
        "input.parquet",
        parquet(prompt=[f"{MARKER} {row}" for row in range(500)]).replace(b" 3", b"\xff\xfe"),
        {},
    ),
    "a repeated id": (
        "input.jsonl",
        lines({"id": "x", "prompt": MARKER}, {"id": "x", "prompt": MARKER}),
        {"input__id_column": "id"},
    ),
    "a template that tells": (
        "input.jsonl",
        lines({"messages": [SAYS]}),
        {
            "input__messages_column": "messages",
            "input__chat_template": "{{ raise_exception(messages[0].content) }}",
        },
    ),
    "a template that stumbles": (
        "input.jsonl",
        lines({"messages": [SAYS]}),
        {
            "input__messages_column": "messages",
            "input__chat_template": "{{ messages[0].content + 1 }}{{ messages[0][messages[0].content] }}",
        },
    ),
}


@pytest.mark.parametrize(
    ("case", "model"),
    [
        *((case, "none") for case in INPUTS),
        ("good and overlong", "tiny-a"),
        ("batch requests", "tiny-a"),
    ],
)
def test_no_prompt_text_is_told_or_kept_elsewhere(
    nightjar: Nightjar, tmp_path: Path, case: str, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    name, data, settings = INPUTS[case]
    (tmp_path / "input").mkdir()
    path = tmp_path / "input" / name
    path.write_bytes(data)
    settings = dict(settings)
    if "input__chat_template" in settings:
        template = tmp_path / "template.jinja"
        template.write_text(settings["input__chat_template"])
        settings["input__chat_template"] = str(template)
    if model == "none":
        settings["engine__backend"] = "dummy"
    done = nightjar.run(model, path, sampling__max_tokens=4, **settings)
    assert done.code in (0, 2), done.err
    assert "Traceback" not in done.err
    check_output(done)
    check_files(tmp_path / "out")
    if done.code == 0:
        for row in done.table.select(["state", "error"]).to_pylist():
            assert MARKER not in (row["error"] or ""), row
        for command in ("status", "verify", "retry", "status", "report", "gc"):
            check_output(nightjar.call(command, str(done.run), "--json"))
        check_files(tmp_path / "out")
    assert MARKER not in caplog.text


def check_output(done: Finished) -> None:
    assert MARKER not in done.err
    assert MARKER not in done.out


def check_files(out: Path) -> None:
    """Every file outside the rows' own places, and of the attempts all but their parts."""
    for path in out.rglob("*"):
        if not path.is_file():
            continue
        place = "/".join(path.relative_to(out).parts[1:])
        if place.startswith(ROWS) and path.suffix == ".parquet":
            continue
        assert MARKER.encode() not in path.read_bytes(), path


def test_a_broken_engine_tells_nothing_of_its_rows(
    nightjar: Nightjar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(lines({"prompt": MARKER}))

    def step(self: DummyBackend) -> Callable[[], None]:
        raise EngineFault("device-side assert")

    monkeypatch.setattr(DummyBackend, "step", step)
    done = nightjar.run("none", path, engine__backend="dummy", shards__max_attempts=1)
    assert done.code == 3
    check_output(done)
    check_files(tmp_path / "out")
    check_output(nightjar.call("status", str(done.run), "--json"))
