"""Kernels compiled ahead are those that the engine's first launches ask for: nothing is compiled twice or later."""

import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: kernels are not tested here")

from inference.config import EngineConfig
from inference.precompile import CardFacts, Precompile, task_for
from tests.processes import json_lines

pytestmark = pytest.mark.timeout(900)
FACTS = CardFacts(capability=90, num_multiprocessors=132)
LLAMA: dict[str, Any] = {"model_type": "llama"}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `tests.warm_up_kernels` prints, on an empty cache."""
    cache = tmp_path_factory.mktemp("triton")
    library = driver_library(tmp_path_factory.mktemp("driver"))
    return json_lines("tests.warm_up_kernels", triton_cache=cache, **library)


def driver_library_is_possible() -> bool:
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return shutil.which("gcc") is not None and headers.exists()


def driver_library(folder: Path) -> dict[str, str]:
    """Build a libcuda that does nothing, for Triton's C extensions to link to; none without a compiler for them."""
    if not driver_library_is_possible():
        return {}
    parts = Path(str(find_spec("triton").origin)).parent / "backends" / "nvidia"
    text = "".join((parts / name).read_text() for name in ("driver.c", "driver.py"))
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*(?=\()", text)))
    source = folder / "libcuda.c"
    source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in names))
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}


def test_foretelling_needs_neither_transformers_nor_a_device(lines: list[dict[str, Any]]) -> None:
    assert lines[0] == {"transformers": False, "cuda": False}


def test_every_variant_that_a_warm_up_asks_for_is_foretold_and_no_other(
    lines: list[dict[str, Any]],
) -> None:
    cases = [line for line in lines if "case" in line]
    assert len(cases) == 9
    for case in cases:
        assert case["num_foretold"] >= 12, case
        assert not case["not_foretold"], case
        assert not case["not_asked"], case


def test_settings_resolve_without_the_model_as_they_do_with_it(lines: list[dict[str, Any]]) -> None:
    assert all(line["same_settings"] for line in lines if "case" in line)


def test_a_warm_up_after_compiling_ahead_compiles_nothing(lines: list[dict[str, Any]]) -> None:
    foretold = next(line["num_foretold"] for line in lines if line.get("case") == "dense")
    last = lines[-1]
    assert (last["found"], last["compiled"]) == (foretold, 0)
    assert last["cached_before"] >= foretold
    assert last["cached_after"] == last["cached_before"]  # launchers included


def test_what_was_compiled_once_is_not_started_again(lines: list[dict[str, Any]]) -> None:
    if not driver_library_is_possible():
        pytest.skip("without a C compiler launchers cannot be built")
    assert (lines[-1]["was_done"], lines[-1]["is_done"]) == (False, True)


def test_another_setting_or_card_is_another_task() -> None:
    config = EngineConfig(model="a")
    task = task_for(FACTS, LLAMA, config, 1)
    assert task["done"] == task_for(FACTS, LLAMA, replace(config, model="b"), 8)["done"]
    others = [
        task_for(replace(FACTS, capability=89), LLAMA, config, 1),
        task_for(FACTS, {"model_type": "mistral"}, config, 1),
        task_for(FACTS, LLAMA, replace(config, max_num_seqs=7), 1),
    ]
    assert len({other["done"] for other in [task, *others]}) == 4


def test_what_cannot_be_compiled_ahead_is_left_to_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG", logger="inference.precompile")
    with Precompile(task_for(FACTS, LLAMA, EngineConfig(model="none"), 1)) as kernels:
        assert kernels.wait(patience_s=600) > 0
    assert "ended with 1" in caplog.text
    assert "ModelError: hidden_size is None" in caplog.text


def test_leaving_the_loading_early_leaves_no_process_behind() -> None:
    with Precompile(task_for(FACTS, LLAMA, EngineConfig(model="none"), 1)) as kernels:
        process = kernels._process
        assert process is not None
        assert process.poll() is None
    assert process.returncode == -9


def test_an_interpreter_that_cannot_be_started_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Precompile(task_for(FACTS, LLAMA, EngineConfig(model="none"), 1)) as kernels:
        assert kernels.wait() == 0.0


def test_nothing_is_started_where_there_is_no_card() -> None:
    kernels = Precompile.beside(LLAMA, EngineConfig(model="none"), torch.device("cpu"))
    assert kernels.wait() == 0.0
