"""The four rooms are ours, and nothing beside us claims or shadows their names."""

import subprocess
import sys
import time
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("flows", "tasks", "inference", "storage")


def python_elsewhere(code: str) -> str:
    """Run `code` from `/`, where the checkout is not on `sys.path` by accident."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd="/", check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("room", ROOMS)
def test_room_resolves_to_this_checkout(room):
    found = python_elsewhere(f"import {room}; print({room}.__file__)").strip()
    assert Path(found).parent == ROOT / room


@pytest.mark.parametrize("room", ROOMS)
def test_no_other_distribution_claims_the_room(room):
    assert set(packages_distributions().get(room, [])) <= {"nightjar"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_module_is_named_like_a_room(room):
    assert not {path.stem for path in (ROOT / room).rglob("*.py")} & set(ROOMS)


def test_no_test_folder_is_named_like_a_room():
    assert not {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir()} & set(ROOMS)


@pytest.mark.parametrize("module", ["flows.batch_generate", "flows.commands", "tasks.run"])
def test_importing_a_flow_or_command_leaves_torch_alone(module):
    probe = f"import sys, {module}; print('torch' in sys.modules)"
    assert python_elsewhere(probe).strip() == "False"


def test_the_commands_need_no_prefect():
    probe = "import sys, flows.commands; print('prefect' in sys.modules)"
    assert python_elsewhere(probe).strip() == "False"


def test_help_imports_nothing_heavy():
    probe = (
        "import sys; from flows.cli import build_parser; build_parser().format_help();"
        "print([m for m in ('torch', 'prefect', 'transformers', 'pyarrow', 'boto3') if m in sys.modules])"
    )
    assert python_elsewhere(probe).strip() == "[]"


@pytest.mark.timing
def test_help_answers_quickly():
    command = [sys.executable, "-m", "flows.cli", "--help"]
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.4
