import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage import failpoints

SCRIPT = "from storage.failpoints import failpoint\nfor _ in range(50): failpoint('here')\nprint('alive')"


def run(value: str | None) -> subprocess.CompletedProcess[str]:
    env = {name: text for name, text in os.environ.items() if name != failpoints.VARIABLE}
    if value is not None:
        env[failpoints.VARIABLE] = value
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=env,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_without_the_variable_nothing_happens() -> None:
    assert run(None).stdout == "alive\n"


def test_a_kill_is_a_real_one() -> None:
    assert run("here:kill:1:0").returncode == -signal.SIGKILL
    assert run("here:exit:0.5:1").returncode == 70
    assert run("elsewhere:kill:1:0,here:kill:0:0").stdout == "alive\n"


def test_a_malformed_variable_is_refused_by_name() -> None:
    for value in ("here", "here:explode:1:0", "here:kill:often:0"):
        with pytest.raises(ValueError, match="is not name:action:probability:seed"):
            failpoints.parse(value)


def test_the_same_seed_dies_at_the_same_pass() -> None:
    passes = [failpoints.parse("x:kill:0.1:7")["x"].random.random() for _ in range(2)]
    assert passes[0] == passes[1]
