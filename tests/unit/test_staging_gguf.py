import errno
import logging
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import stage_turn
from storage.errors import BadInput, CorruptObject, InputChanged, NoSpace
from storage.object_store import StorageConfig
from storage.staging import find_model, stage_model
from tests.model_files import folder_bytes, write_model

CONFIG = StorageConfig()


class Converter:
    """Makes a folder from a file; counts how often."""

    def __init__(self) -> None:
        self.calls: list[Path] = []
        self.error: Exception | None = None
        self.spoil = False

    def __call__(self, gguf: Path, folder: Path) -> None:
        self.calls.append(gguf)
        assert not folder.exists()
        write_model(folder, num_weight_files=1)
        (folder / "name.txt").write_bytes(gguf.read_bytes())
        if self.error:
            raise self.error
        if self.spoil:
            (folder / "model-00001-of-00001.safetensors").write_bytes(b"short")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(1000))
    return path


def test_a_gguf_file_is_converted_once(gguf: Path, tmp_path: Path) -> None:
    convert = Converter()
    options = {"config": CONFIG, "stage_to": str(tmp_path / "cache"), "convert_gguf": convert}
    with stage_model(str(gguf), **options) as staged:  # type: ignore[arg-type]
        assert (staged.path / "name.txt").read_bytes() == gguf.read_bytes()
        assert set(folder_bytes(staged.path)) == {file.name for file in staged.manifest.files}
        assert staged.report.phases["convert"] >= 0
    with stage_model(str(gguf), **options) as again:  # type: ignore[arg-type]
        assert again.report.outcome == "hit"
    assert convert.calls == [gguf]
    gguf.write_bytes(b"GGUF" + b"1" * 1000)
    with stage_model(str(gguf), **options) as other:  # type: ignore[arg-type]
        assert other.content_id != staged.content_id
    assert len(convert.calls) == 2


def test_another_dtype_is_another_model(gguf: Path, tmp_path: Path) -> None:
    convert, cache = Converter(), str(tmp_path / "cache")
    for dtype in ("bfloat16", "float32", "float32"):
        stage_model(
            str(gguf), config=CONFIG, stage_to=cache, convert_gguf=convert, gguf_dtype=dtype
        ).close()
    assert len(convert.calls) == 2
    assert find_model(str(gguf), config=CONFIG, stage_to=cache, gguf_dtype="float16") is None
    found = find_model(str(gguf), config=CONFIG, stage_to=cache, gguf_dtype="float32")
    assert found is not None
    found.close()


def test_a_conversion_that_fails_publishes_nothing_and_can_be_repeated(
    gguf: Path, tmp_path: Path
) -> None:
    convert = Converter()
    options = {"config": CONFIG, "stage_to": str(tmp_path / "cache"), "convert_gguf": convert}
    convert.error = OSError(errno.ENOSPC, "full")
    with pytest.raises(NoSpace, match="make room"):
        stage_model(str(gguf), **options)  # type: ignore[arg-type]
    convert.error = KeyError("broken")
    with pytest.raises(KeyError):
        stage_model(str(gguf), **options)  # type: ignore[arg-type]
    convert.error, convert.spoil = None, True
    with pytest.raises(CorruptObject, match="too few"):
        stage_model(str(gguf), **options)  # type: ignore[arg-type]
    assert not list((tmp_path / "cache").rglob("MANIFEST.json"))
    convert.spoil = False
    with stage_model(str(gguf), **options) as staged:  # type: ignore[arg-type]
        assert staged.report.outcome == "staged"


def test_a_file_rewritten_while_it_is_converted_is_never_published(
    gguf: Path, tmp_path: Path
) -> None:
    def convert(path: Path, folder: Path) -> None:
        Converter()(path, folder)
        gguf.write_bytes(b"GGUF" + b"1" * 1000)

    with pytest.raises(InputChanged, match=r"m\.gguf: changed"):
        stage_model(
            str(gguf), config=CONFIG, stage_to=str(tmp_path / "cache"), convert_gguf=convert
        )
    assert not list((tmp_path / "cache").rglob("MANIFEST.json"))


def test_without_a_converter_a_gguf_file_is_refused(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no converter"):
        stage_model(str(gguf), config=CONFIG, stage_to=str(tmp_path / "cache"))
    with pytest.raises(BadInput, match="cannot be read in place"):
        stage_model(str(gguf), config=CONFIG, stage_to="none")


def test_a_second_process_that_waits_for_a_conversion_says_who_converts_and_for_how_long(
    gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_turn, "_SAY_EVERY_S", 0.3)
    caplog.set_level(logging.INFO, logger="storage.stage_turn")
    is_converting, may_end = threading.Event(), threading.Event()

    def convert(path: Path, folder: Path) -> None:
        is_converting.set()
        assert may_end.wait(30)
        Converter()(path, folder)

    def stage() -> str:
        cache = str(tmp_path / "cache")
        with stage_model(str(gguf), config=CONFIG, stage_to=cache, convert_gguf=convert) as staged:
            return staged.report.outcome

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stage)
        assert is_converting.wait(30)
        second = pool.submit(stage)
        while len(caplog.records) < 2:
            assert not second.done()
            time.sleep(0.05)
        may_end.set()
        assert (first.result(), second.result()) == ("staged", "hit")
    said = (
        rf"process {os.getpid()} of {socket.gethostname()} has been converting .*m\.gguf for \d+ s"
    )
    for record in caplog.records:
        assert re.search(
            said + ".*none of its files can be read before all are", record.getMessage()
        )
    assert [record.levelname for record in caplog.records][:2] == ["INFO", "WARNING"]
