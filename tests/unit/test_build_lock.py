"""The lock that torch leaves behind when a build is killed: it must never be waited for in vain."""

import os
import threading
import time

import pytest

from inference.async_io import build_folder, clear_build_lock
from inference.errors import EngineFault


def test_a_lock_that_nobody_holds_is_removed(tmp_path, caplog):
    lock = tmp_path / "lock"
    lock.touch()
    clear_build_lock(lock)
    assert not lock.exists()
    assert f"{lock} was left behind by a build that was killed" in caplog.text


def test_a_lock_that_is_held_is_waited_for(tmp_path, caplog):
    lock = tmp_path / "lock"
    held = os.open(lock, os.O_CREAT | os.O_EXCL)  # as torch does

    def build() -> None:
        time.sleep(0.3)
        os.close(held)
        lock.unlink()

    builder = threading.Thread(target=build)
    builder.start()
    clear_build_lock(lock)
    builder.join()
    assert not lock.exists()
    assert caplog.text == ""


def test_a_lock_that_is_held_too_long_names_its_holder_and_stays(tmp_path):
    lock = tmp_path / "lock"
    held = os.open(lock, os.O_CREAT | os.O_EXCL)
    with pytest.raises(EngineFault, match=rf"{lock}: process {os.getpid()} has been building"):
        clear_build_lock(lock, deadline_s=0.1)
    os.close(held)
    assert lock.exists()


def test_the_build_folder_is_torchs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    from torch.utils import cpp_extension

    assert build_folder("async_io") == tmp_path / "async_io"
    assert str(build_folder("async_io")) == cpp_extension._get_build_directory("async_io", False)
