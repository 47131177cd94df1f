"""Folders as large as a model must not outlive their process for long."""

import subprocess
import sys
from pathlib import Path

from inference.swap_folder import SwapFolder


def test_a_folder_is_gone_when_it_is_closed(tmp_path):
    folder = SwapFolder(str(tmp_path))
    (folder.path / "deep").mkdir()
    (folder.path / "deep" / "weights.swp").write_bytes(b"x")
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_stays(tmp_path, caplog):
    living = SwapFolder(str(tmp_path))
    code = (
        "import os, signal, sys; from inference.swap_folder import SwapFolder;"
        "folder = SwapFolder(sys.argv[1]); print(folder.path, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True
    )
    left = Path(ended.stdout.strip())
    assert left.is_dir()
    another = SwapFolder(str(tmp_path))
    assert not left.exists()
    assert living.path.is_dir()
    assert f"{left} was left behind by a process that was killed" in caplog.text
    living.close()
    another.close()
