"""Every hostile kind of Parquet file has its stated outcome, and reading it takes little memory.

The memory is that of the child that reads, above what it needs to be ready, under the limits that every
run has; that child outlives all of them.
"""

import datetime
import decimal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from inference.errors import InferenceError
from storage.errors import BadInput
from tasks.feed_process import FeedProcess
from tests.feed_bench import CASES, MODELS, Bench, make_job
from tests.hostile_files import MAKERS, MESSAGE

MB = 1_000_000
MAX_PEAK_BYTES = 300 * MB


@dataclass(frozen=True)
class Read:
    """The file is read: its columns as they are, the first prompt, and what is said of each row."""

    first: dict[str, Any] | None
    prompt: str | None = None
    errors: list[str | None] = field(default_factory=lambda: [None])


@dataclass(frozen=True)
class Refused:
    """The run is refused before any shard, in one line with these words."""

    said: str


HI = Read({"id": 3, "prompt": "hi"}, "hi")
TWO_ROWS = Read({"id": 1, "prompt": "hi"}, "hi", [None, None])
X = {"prompt": "x"}
TEXT_MESSAGES = '[{"role": "user", "content": "hi"}]'

OUTCOMES: dict[str, Read | Refused] = {
    "normal": TWO_ROWS,
    # Text is text, however Arrow holds it.
    "large_string": HI,
    "string_view": HI,
    "dictionary": Read({"id": 3, "prompt": "hi"}, "hi", [None, None]),
    "binary_utf8": Read({"id": 3, "prompt": b"hi"}, "hi"),
    "strings_of_four_kinds": Read({"id": 1, "prompt": "hi"}, "hi", [None] * 5),
    # Messages in every form give one prompt, and none of them is dropped in silence.
    "messages_struct": Read({"id": 3, "messages": [MESSAGE]}, "hi"),
    "messages_extra_fields": Read(
        {"id": 3, "messages": [{**MESSAGE, "name": None, "tool_calls": [{"id": "1"}]}]},
        'hi\n<tool_call>{"id": "1"}</tool_call>',
    ),
    "messages_swapped_fields": Read({"id": 3, "messages": [MESSAGE]}, "hi"),
    "messages_multimodal_text": Read(
        {"id": 3, "messages": [{**MESSAGE, "content": [{"type": "text", "text": "hi"}]}]}, "hi"
    ),
    "messages_multimodal_image": Read(
        {
            "id": 3,
            "messages": [{**MESSAGE, "content": [{"type": "image_url", "url": "http://h/x"}]}],
        },
        None,
        ["content of type image_url"],
    ),
    "messages_map": Read({"id": 3, "messages": [[("role", "user"), ("content", "hi")]]}, "hi"),
    "messages_json_string": Read({"id": 3, "messages": TEXT_MESSAGES}, "hi"),
    "messages_beside_prompts": Refused("messages and prompt could both be the prompt"),
    # Nothing is made up where there is nothing, and nothing becomes text in silence.
    "all_null_prompt": Read({"id": 3, "prompt": None}, None, ["column 'prompt' is null"]),
    "nulls": Read({"id": 3, "prompt": "a"}, "a", [None, "column 'prompt' is null", None]),
    "int_prompt": Refused("is int64, not text; to format it, set input.prompt to '{prompt}'"),
    "zero_rows": Read(None, None, []),
    "zero_columns": Read(None, None, []),
    "duplicate_columns": Refused("column 'prompt' appears twice; rename one"),
    "names_that_differ_in_case": Read(
        {"id": "value 0", "prompt": "value 1", "Prompt": "value 2"}, "value 1"
    ),
    "dotted_name": Read({"id": "value 0", "a.prompt": "value 1", "prompt": "value 2"}, "value 2"),
    # Bytes that are no text cost their row.
    "not_utf8": Read({"id": 3, "prompt": "\ufffd\ufffdA"}, None, ["not UTF-8"]),
    "lone_surrogate": Read({"id": 3, "prompt": "\ufffd\ufffd\ufffd"}, None, ["not UTF-8"]),
    "nul_bytes": Read({"id": 3, "prompt": "a\0b"}, "a\0b"),
    # Values come back exactly, whatever the type.
    "nanoseconds": Read({**X, "ts": 10**18 + 1}, "x"),
    "time_out_of_range": Read(
        {**X, "ts": datetime.datetime(5138, 11, 16, 9, 46, 40, tzinfo=datetime.UTC)}, "x"
    ),
    "int96": Read({**X, "ts": datetime.datetime(2600, 1, 1)}, "x"),
    "decimal_and_uint64": Read({**X, "big": 2**64 - 1, "d": decimal.Decimal("1.10")}, "x"),
    "string_id": Read({**X, "id": "a"}, "x"),
    "ids_of_two_kinds": Refused("column 'id' is int64 in"),
    # An extension type is its storage; no code of it runs.
    "extension_json": Read({"id": 3, "messages": TEXT_MESSAGES}, "hi"),
    "extension_uuid": Read({**X, "id": uuid.UUID(bytes=b"0" * 16)}, "x"),
    "extension_pickle": Read(X, "x"),
    "extension_unknown": Read(X, "x"),
    # A damaged file is named, with what is wrong.
    "cut_at_the_end": Refused("in.parquet: not a readable Parquet file"),
    "cut_at_the_start": Refused("in.parquet: damaged near row 0"),
    "empty": Refused("in.parquet: the file is empty (0 bytes)"),
    "magic_only": Refused("in.parquet: not a readable Parquet file"),
    "huge_footer": Refused("in.parquet: not a readable Parquet file"),
    "encrypted": Refused("in.parquet: not a readable Parquet file: Could not read encrypted"),
    "jsonl_by_another_name": Read({"prompt": "hi"}, "hi"),
    # Without a checksum nobody can see the damage; with one it is found.
    "bit_flip": Read({"id": 1, "prompt": "hi"}, "hi", [None, None]),
    "bit_flip_with_checksum": Refused("CRC"),
    # Folder names are no columns, and markers no files.
    "hive_folder": TWO_ROWS,
    "hive_folder_like_a_column": TWO_ROWS,
    "hive_null_folder": Read({"id": 1, "prompt": "hi"}, "hi", [None] * 4),
    # What would take gigabytes is read in pieces, or refused by name.
    "dictionary_bomb": Read({"prompt": "p", "note": "x" * 2**20}, "p", [None] * 200),
    "page_bomb": Refused("needs more memory than reading may use"),
    "cell_bomb": Refused("needs more memory than reading may use"),
    "many_nulls": Read({"prompt": None}, None, ["column 'prompt' is null"] * 5_000),
    "nested_beyond_two_gigabytes": Read(
        {"messages": [MESSAGE]}, "hi", [None, *["message 0 has no role"] * 2112]
    ),
}


class Child:
    """A feed's child process and how much memory it holds."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def resident_bytes(self, name: str = "VmRSS") -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
        raise AssertionError(name)

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def process() -> Iterator[FeedProcess]:
    """One child for all kinds, its tokenizer loaded when the first is read."""
    with FeedProcess.of(
        make_job("unused"), model_dir=MODELS / "tiny-a", max_model_len=256
    ) as process:
        yield process


@pytest.fixture
def child(process: FeedProcess, tmp_path: Path) -> Child:
    """The child, ready and idle."""
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm-in").mkdir()
    if process._child is None:
        MAKERS["normal"](tmp_path / "warm-in")
        outcome(process, tmp_path / "warm-in", tmp_path / "warm")
    assert process._child is not None
    return Child(process._child.pid)


def outcome(process: FeedProcess, source: Path, work: Path) -> Read | Refused:
    """Plan a folder of files and read every row of it."""
    bench, job = Bench(work), make_job(source)
    process.begin_pass()
    try:
        plan = bench.plan(job, "tiny-a", process=process)
        feed = bench.open(job, "tiny-a", process=process)
        first, errors = None, []
        for batch in feed.read(plan, 0, plan.num_rows):
            first = first or values(batch.columns.slice(0, 1).to_pylist()[0])
            errors += [row.error for row in batch.rows]
        shown = feed.show(plan, num_samples=0, num_rows=5)["prompt"] if plan.num_rows else None
    except (BadInput, InferenceError) as error:
        return Refused(str(error))
    return Read(first, shown, errors)


def values(record: dict[str, Any]) -> dict[str, Any]:
    """pandas, where it is installed, gives nanoseconds as its own type."""
    return {name: getattr(value, "value", value) for name, value in record.items()}


def check(found: Read | Refused, wanted: Read | Refused) -> None:
    if isinstance(wanted, Refused):
        assert isinstance(found, Refused), found
        assert wanted.said in found.said
        assert "\n" not in found.said
        return
    assert isinstance(found, Read), found
    assert found.first == wanted.first
    framed = (
        wanted.prompt and f"<|im_start|>user\n{wanted.prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found.prompt == framed
    assert len(found.errors) == len(wanted.errors)
    for said, expected in zip(found.errors, wanted.errors, strict=True):
        assert (said is None) == (expected is None)
        assert expected is None or expected in str(said)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_hostile_file_has_its_stated_outcome_in_little_memory(
    process: FeedProcess, child: Child, tmp_path: Path, kind: str
) -> None:
    source, work = tmp_path / "in", tmp_path / "work"
    source.mkdir()
    work.mkdir()
    MAKERS[kind](source)
    child.forget_peak()
    before = child.resident_bytes()
    found = outcome(process, source, work)
    assert process._child is not None
    assert process._child.pid == child.pid, "the child did not outlive this file"
    peak = child.resident_bytes("VmHWM") - before
    check(found, OUTCOMES[kind])
    assert peak < MAX_PEAK_BYTES, f"{peak / MB:.0f} MB"


def test_no_input_of_the_cases_takes_more_memory(
    process: FeedProcess, child: Child, tmp_path: Path
) -> None:
    """Their outcomes are stated where each is tested with its own settings."""
    inputs = [path for path in CASES.rglob("*") if path.suffix in (".parquet", ".jsonl", ".csv")]
    assert len(inputs) >= 45
    num_read = 0
    for index, path in enumerate(sorted(inputs)):
        work = tmp_path / f"{index}"
        work.mkdir()
        child.forget_peak()
        before = child.resident_bytes()
        num_read += isinstance(outcome(process, path, work), Read)
        assert process._child is not None
        assert process._child.pid == child.pid, path
        assert child.resident_bytes("VmHWM") - before < MAX_PEAK_BYTES, path
    assert num_read >= 35


def test_every_kind_has_an_outcome() -> None:
    assert OUTCOMES.keys() == MAKERS.keys()
    assert len(MAKERS) >= 40
