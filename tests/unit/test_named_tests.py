"""The tables of cases, promises and threats name tests that exist, and no case is forgotten."""

import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
CASES = TESTS / "data" / "cases"
TABLES = [TESTS / "README.md", CASES / "README.md", ROOT / "SECURITY.md"]
_NAMED = re.compile(
    r"`((?:unit|integration|faults|gpu|cluster)/\w+\.py|test_\w+\.py)::(test_[\w*]+)`"
)


def named(table: Path) -> list[tuple[str, str]]:
    return _NAMED.findall(table.read_text())


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.parent.name)
def test_every_test_that_is_named_exists(table: Path) -> None:
    found = named(table)
    assert len(found) >= 20
    for file, name in found:
        source = TESTS / file
        assert source.is_file(), f"{table}: {file}"
        defined = re.findall(r"^ *def (test_\w+)", source.read_text(), re.MULTILINE)
        assert fnmatch.filter(defined, name), f"{table}: {file}::{name}"


def test_every_row_of_a_table_of_promises_names_a_test() -> None:
    for table in TABLES:
        rows = [line for line in table.read_text().splitlines() if re.match(r"\| (?!---)", line)]
        promises = [row for row in rows if not re.search(r"\| *held by *\|$", row)]
        assert promises
        for row in promises:
            assert _NAMED.search(row), f"{table}: {row}"


def test_every_case_is_in_the_table_and_those_here_are_used() -> None:
    text = (CASES / "README.md").read_text()
    listed = set(re.findall(r"^\| ([A-I]\d+) \|", text, re.MULTILINE))
    assert len(listed) == 45
    folders = [path.name for path in CASES.iterdir() if path.is_dir()]
    assert {name.split("-")[0] for name in folders} <= listed
    sources = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    assert not [
        name for name in folders if name not in sources and name.split("-")[0] + "-" not in sources
    ]
