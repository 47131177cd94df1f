"""Models larger than the device, through DeepSpeed: the reference's tokens, wherever the weights are kept."""

import logging
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3MoeConfig

from inference.backends import create_backend
from inference.backends.ranked import RankedBackend
from inference.backends.transformers import TransformersBackend
from inference.config import EngineConfig
from inference.errors import EngineConfigError
from inference.offload import Room, resolve_place
from inference.sampling import SamplingParams
from inference.sequence import Completion, Sequence
from tests.pipeline import CASES, Nightjar
from tests.pipeline import expected as expected_of
from tests.tiny_models import EXPERTS, MODELS, SIZES, make_model

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
from inference.async_io import build_folder, load_async_io
from inference.backends.zero import ZeroBackend
from inference.deepspeed_setup import import_deepspeed


def config(model: Path, **knobs: Any) -> EngineConfig:
    return EngineConfig(**{"model": str(model), "backend": "zero", "max_num_seqs": 4} | knobs)


def sequences(num: int, **fields: Any) -> list[Sequence]:
    return [
        Sequence(
            i,
            [3 + (7 * i + 11 * k) % 250 for k in range(1 + (17 * i) % 30)],
            SamplingParams(**{"max_tokens": 2 + i % 7, "temperature": 0.7 * (i % 2)} | fields),
            draw_seed=i,
        )
        for i in range(num)
    ]


def run(backend: Any, given: list[Sequence]) -> dict[int, Completion]:
    backend.submit(given)
    found = {}
    while backend.num_unfinished:
        found |= {completion.seq_id: completion for completion in backend.step()}
    backend.close()
    return found


def expected(model: Path, given: list[Sequence], **knobs: Any) -> dict[int, Completion]:
    return run(TransformersBackend(config(model, backend="transformers", **knobs)), given)


@pytest.mark.parametrize("kind", ["dense", "dense in bfloat16", "tied", "experts"])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_tokens_are_the_references(kind, offload, tmp_path):
    model = MODELS / ("tiny-tied-sharded" if kind == "tied" else "tiny-a")
    if kind == "experts":
        model = make_model(tmp_path, Qwen3MoeConfig(**SIZES, **EXPERTS))
    knobs = {"dtype": kind.split()[-1]} if " in " in kind else {}
    found = run(ZeroBackend(config(model, offload=offload, **knobs)), sequences(10))
    assert found == expected(model, sequences(10), **knobs)


def test_rotary_frequencies_are_not_rounded_to_the_weights_dtype(monkeypatch):
    # As transformers 5.17 loads under ZeRO-3: nothing keeps DeepSpeed from what constructors make.
    name = "transformers.modeling_utils.prevent_arange_dtype_change"
    monkeypatch.setattr(name, nullcontext, raising=False)
    knobs = {"dtype": "bfloat16"}
    reference = TransformersBackend(config(MODELS / "tiny-a", backend="transformers", **knobs))
    backend = ZeroBackend(config(MODELS / "tiny-a", offload="cpu", **knobs))
    whole = dict(reference._model.named_buffers())
    found = dict(backend._model.named_buffers())
    backend.close()
    assert found.keys() == whole.keys() != set()
    for name, buffer in whole.items():
        assert found[name].dtype == buffer.dtype == torch.float32
        assert torch.equal(found[name], buffer), name


def test_long_prompts_run_in_several_passes_and_change_nothing():
    backend = ZeroBackend(config(MODELS / "tiny-a", max_num_batched_tokens=16))
    prefills = []

    def watch(module: Any, args: Any, kwargs: Any) -> None:
        prefills.append(tuple(kwargs["input_ids"].shape))

    backend._model.register_forward_pre_hook(watch, with_kwargs=True)
    found = run(backend, sequences(12))
    assert found == expected(MODELS / "tiny-a", sequences(12))
    assert max(rows * columns for rows, columns in prefills) == 16
    assert backend.stats.num_prompt_tokens == sum(len(s.prompt_token_ids) for s in sequences(12))


def test_between_passes_no_matrix_is_on_the_device():
    backend = ZeroBackend(config(MODELS / "tiny-a"))
    backend.submit(sequences(2))
    backend.step()
    held = {
        n for n, p in backend._model.named_parameters() if p.numel() and p.ds_shape.numel() > 64
    }
    assert held == set()
    assert backend.info.memory == {
        "host_weights": 4 * sum(p.ds_numel for p in backend._model.parameters())
    }
    backend.close()


def test_nothing_of_deepspeed_is_left_in_the_process():
    backend = ZeroBackend(config(MODELS / "tiny-a"))
    linear = torch.nn.functional.linear
    plain = TransformersBackend(config(MODELS / "tiny-a", backend="transformers"))
    assert not hasattr(next(plain._model.parameters()), "ds_id")
    assert "LOCAL_RANK" not in os.environ
    assert torch.nn.functional.linear is linear
    assert "deepspeed" not in linear.__module__
    backend.close()


def test_out_of_memory_halves_the_batch_and_changes_no_token(caplog):
    backend = ZeroBackend(config(MODELS / "tiny-a", max_num_seqs=8))

    def hold(module: Any, args: Any) -> None:
        if args[0].shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    backend._model.model.layers[1].register_forward_pre_hook(hold)
    with caplog.at_level(logging.WARNING, "inference"):
        found = run(backend, sequences(16))
    assert found == expected(MODELS / "tiny-a", sequences(16))
    assert "going on with at most 2 at once" in caplog.text


def test_a_job_of_one_row_ends_on_two_ranks_with_its_row(tmp_path, capsys):
    case = "I4-more-workers-than-rows"
    done = Nightjar(tmp_path, capsys).run(
        "chain-a", CASES / case / "input.parquet", engine__backend="zero",
        engine__tensor_parallel_size=2, engine__offload="cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert {row["id"]: row["completion"] for row in done.rows} == expected_of(case)["text"]


def test_ranks_that_run_out_of_rows_leave_no_other_waiting():
    ranks = create_backend(config(MODELS / "tiny-a", tensor_parallel_size=2))
    one = sequences(1, max_tokens=8)
    ranks.submit(one)
    found = {}
    while ranks.num_unfinished:
        found |= {completion.seq_id: completion for completion in ranks.step()}
    assert found == expected(MODELS / "tiny-a", one)
    # Six of one rank end while the other's long one runs on; then there is more.
    lengths = [40, 1, 2, 3, 2, 1, 3]
    uneven = [replace(s, sampling=replace(s.sampling, max_tokens=n, ignore_eos=True))
              for s, n in zip(sequences(8)[1:], lengths, strict=True)]  # fmt: skip
    assert run(ranks, uneven) == expected(MODELS / "tiny-a", uneven)
    assert ranks.stats.num_prompt_tokens == sum(len(s.prompt_token_ids) for s in [*one, *uneven])


def test_ranks_of_which_one_is_out_of_memory_go_on_together_with_half_its_batch(
    monkeypatch, caplog
):
    monkeypatch.setenv("NIGHTJAR_TEST_MOST_ROWS", "3")
    settings = config(MODELS / "tiny-a", tensor_parallel_size=2, max_num_seqs=8)
    ranks = RankedBackend(settings, module="tests.small_rank")
    before = ranks.ranks.pids
    with caplog.at_level(logging.WARNING, "inference"):
        ranks.submit(sequences(16))
        found = {}
        while ranks.num_unfinished:
            found |= {completion.seq_id: completion for completion in ranks.step()}
    after = ranks.ranks.pids
    ranks.close()
    assert found == expected(MODELS / "tiny-a", sequences(16))
    assert set(before.values()).isdisjoint(after.values())
    assert "start again with at most 4 sequences at once instead of 8" in caplog.text
    assert "start again with at most 2 sequences at once instead of 4" in caplog.text


def test_of_ranks_too_the_one_sequence_that_is_too_large_alone_fails_and_the_others_go_on(
    monkeypatch,
):
    given = sequences(6)
    lengths = [len(sequence.prompt_token_ids) for sequence in given]
    (large,) = [s for s in given if len(s.prompt_token_ids) == max(lengths)]
    # Dealt by turns, it would be on either rank; submitted second, it is on the small one.
    given = [given[0], large, *(s for s in given[1:] if s is not large)]
    monkeypatch.setenv("NIGHTJAR_TEST_FULL_AT", str(max(lengths)))
    settings = config(MODELS / "tiny-a", tensor_parallel_size=2, max_num_seqs=2)
    found = run(RankedBackend(settings, module="tests.small_rank"), given)
    failed = found.pop(large.seq_id)
    assert failed.finish_reason == "error"
    assert "out of memory with this sequence alone" in failed.error
    wanted = expected(MODELS / "tiny-a", given)
    assert found == {seq_id: c for seq_id, c in wanted.items() if seq_id != large.seq_id}


@pytest.fixture(scope="module")
def async_io() -> None:
    """DeepSpeed's NVMe operator; minutes to build, so only where it has been built before."""
    if not (build_folder("async_io") / "async_io.so").exists():
        pytest.skip("async_io is not built; python -m inference.async_io")
    import_deepspeed()
    load_async_io()


LOAD = """
import sys
from inference.async_io import load_async_io
from inference.deepspeed_setup import import_deepspeed
from inference.errors import InferenceError
import_deepspeed()
try:
    print(load_async_io().__file__)
except InferenceError as error:
    print(type(error).__name__, error)
"""


def loaded_without_a_compiler(folder: Path, tmp_path: Path) -> str:
    """What a process says that finds operators in `folder` and no compiler anywhere."""
    (tmp_path / "bin").mkdir()
    return subprocess.run(
        [sys.executable, "-c", LOAD],
        env={**os.environ, "PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(folder)},
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    ).stdout.splitlines()[-1]


@pytest.mark.usefixtures("async_io")
def test_what_was_built_for_an_image_is_loaded_where_nothing_can_be_built(tmp_path):
    built = build_folder("async_io")
    assert loaded_without_a_compiler(built.parent, tmp_path) == str(built / "async_io.so")


@pytest.mark.usefixtures("async_io")
@pytest.mark.parametrize("name", ["pin_memory", "async_io"])
def test_operators_are_built_without_what_takes_most_of_the_time(name):
    (flags,) = re.findall("^cflags = (.*)$", (build_folder(name) / "build.ninja").read_text(), re.M)
    assert "-DTORCH_INDUCTOR_CPP_WRAPPER" in flags.split()
    assert b".debug_info" not in (build_folder(name) / f"{name}.so").read_bytes()


@pytest.mark.usefixtures("async_io")
def test_a_build_that_fails_is_told_in_one_line(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *.cpp*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    said = subprocess.run(
        [sys.executable, "-m", "inference.async_io"],
        env=os.environ | {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert said.returncode == 1
    assert said.stderr.splitlines()[-1].startswith(
        "engine.offload is nvme: async_io does not build: Error building extension 'pin_memory'"
    )


@pytest.mark.usefixtures("async_io")
def test_a_build_needs_no_ninja_on_the_path_but_that_beside_python(tmp_path):
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        if folder != Path(sys.executable).parent and folder.is_dir():
            for program in folder.iterdir():
                if program.name != "ninja" and not (tmp_path / program.name).is_symlink():
                    (tmp_path / program.name).symlink_to(program)
    said = subprocess.run(
        [sys.executable, "-m", "inference.async_io"],
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert said.stdout.startswith("async_io is built"), said.stderr


def test_what_was_built_for_another_torch_is_refused_with_its_path(tmp_path):
    for name in ("pin_memory", "async_io"):
        (tmp_path / "ops" / name).mkdir(parents=True)
        (tmp_path / "ops" / name / f"{name}.so").write_bytes(b"not a library")
    said = loaded_without_a_compiler(tmp_path / "ops", tmp_path)
    assert said.startswith(
        f"EngineFault {tmp_path}/ops/pin_memory/pin_memory.so: built for another"
    )
    assert "build it again by `python -m inference.async_io`" in said


def test_without_a_compiler_and_without_what_it_built_nvme_is_refused(tmp_path):
    said = loaded_without_a_compiler(tmp_path / "ops", tmp_path)
    assert said.startswith("EngineConfigError engine.offload is nvme: needs libaio and its headers")


@pytest.mark.usefixtures("async_io")
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_weights_on_nvme_give_the_references_tokens_and_are_gone_afterwards(kind, tmp_path):
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    sizes |= {
        "head_dim": 64,
        "num_key_value_heads": 8,
    }  # files hold parameters of a megabyte and more
    experts = EXPERTS | {"moe_intermediate_size": 256}
    kinds = {"dense": Qwen3Config(**sizes), "experts": Qwen3MoeConfig(**sizes, **experts)}
    model = make_model(tmp_path / "model", kinds[kind])
    disk = tmp_path / "nvme"
    disk.mkdir()
    backend = ZeroBackend(config(model, offload="nvme", nvme_path=str(disk)))
    swapped = sum(path.stat().st_size for path in disk.rglob("*.swp"))
    assert swapped > 0.9 * (model / "model.safetensors").stat().st_size - 4 * 2 * 320 * 512
    found = run(backend, sequences(6))
    assert list(disk.iterdir()) == []
    assert found == expected(model, sequences(6))


ROOMY = Room(host=100 * 10**9, disk=500 * 10**9)


@pytest.mark.parametrize(
    ("knobs", "gigabytes", "place"),
    [
        ({}, 80, "cpu"),
        ({"nvme_path": "/"}, 80, "cpu"),
        ({"nvme_path": "/"}, 90, "nvme"),
        ({"offload": "nvme", "nvme_path": "/"}, 1, "nvme"),
        ({"offload": "none"}, 9000, "none"),
    ],
)
def test_weights_go_where_they_fit(knobs, gigabytes, place):
    assert resolve_place(config(MODELS, **knobs), gigabytes * 10**9, ROOMY) == place


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({}, "90.0 GB of weights, 100.0 GB of host memory free, of which 85% .* nvme with"),
        ({"offload": "cpu", "nvme_path": "/"}, "is cpu: 90.0 GB of weights, 100.0 GB of host"),
        ({"offload": "nvme", "nvme_path": "/"}, "90.0 GB of weights, 50.0 GB free in /"),
    ],
)
def test_weights_that_fit_nowhere_are_refused_with_the_arithmetic(knobs, words):
    with pytest.raises(EngineConfigError, match=words):
        resolve_place(config(MODELS, **knobs), 90 * 10**9, Room(100 * 10**9, 50 * 10**9))


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"quantization": "int8"}, "int8: the zero backend moves weights as they are stored"),
        ({"quantization": "fp8"}, "fp8: the zero backend"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is fp8"),
        ({"offload": "nvme"}, "nvme_path is not set"),
        ({"offload": "nvme", "nvme_path": "/no/such"}, "/no/such: no such folder"),
        ({"tensor_parallel_size": 2}, "is 2: .* there are 1; start it through the launcher"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(knobs, words):
    with pytest.raises(EngineConfigError, match=words):
        ZeroBackend(config(MODELS / "tiny-a", **knobs))


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 works on CUDA")
def test_float16_on_the_cpu_is_refused():
    with pytest.raises(
        EngineConfigError, match=r"no float16 on the CPU; use model\.dtype bfloat16"
    ):
        ZeroBackend(config(MODELS / "tiny-a", dtype="float16"))


def test_without_deepspeed_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(EngineConfigError, match=r"pip install --no-build-isolation 'deepspeed"):
        ZeroBackend(config(MODELS / "tiny-a"))
