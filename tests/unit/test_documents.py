"""What the documents say is there."""

import re
import shlex
from pathlib import Path

import pytest

from flows import cli
from storage.records import STATES, result_fields

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = [
    *REPOSITORY.glob("*.md"),
    REPOSITORY / "deployments" / "README.md",
    REPOSITORY / "tests" / "README.md",
]
ROOMS = ("flows", "tasks", "inference", "storage")
README = (REPOSITORY / "README.md").read_text()
RUNNING = (REPOSITORY / "deployments" / "README.md").read_text()


def commands_of(text: str) -> list[str]:
    """Commands that stand on a line of their own in a block, without what follows them."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("nightjar ")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_to_a_file_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_module_a_document_names_is_there(document):
    paths = rf"`((?:{'|'.join(ROOMS)}|tests|deployments|configs)/[\w./-]+)`"
    for path in re.findall(paths, document.read_text()):
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("command", [*commands_of(README), *commands_of(RUNNING)])
def test_the_command_line_takes_every_command_shown(command):
    words = shlex.split(command.replace("[", "").replace("]", ""), comments=True)
    assert cli.build_parser().parse_args(words[1:]).command == words[1]


def test_every_command_is_shown_somewhere():
    shown = set(re.findall(r"nightjar (\w+)", README + RUNNING))
    assert set(cli.build_parser()._subparsers._group_actions[0].choices) <= shown


def test_every_exit_code_is_told():
    codes = {value for name, value in vars(cli).items() if name.startswith("EXIT_")}
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.M)}
    assert codes == told


def test_every_result_column_and_state_is_told():
    for field in result_fields(token_ids=True, logprobs=True):
        assert f"`{field.name}`" in README
    for state in STATES:
        assert f"`{state}`" in README


def test_every_variable_the_code_reads_is_told():
    sources = [path.read_text() for room in ROOMS for path in (REPOSITORY / room).rglob("*.py")]
    read = set(re.findall(r"NIGHTJAR_[A-Z_]+", "".join(sources)))
    assert read
    assert sorted(name for name in read if f"`{name}`" not in RUNNING) == []


def test_every_make_target_that_is_named_is_there():
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    for document in DOCUMENTS:
        assert set(re.findall(r"(?:^|`)make ([a-z]+)", document.read_text(), re.M)) <= targets
