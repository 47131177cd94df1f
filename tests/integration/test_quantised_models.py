"""Quantised weights: bitsandbytes on this machine, checkpoints that are quantised already, and what is refused."""

import importlib.util
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3MoeConfig

from inference.backends import check_engine, create_backend
from inference.config import EngineConfig
from inference.errors import EngineConfigError, ModelError
from inference.quantization import _PACKAGES
from inference.sampling import SamplingParams
from inference.sequence import Completion, Sequence
from inference.weights import check_small_files
from tests.fp8_checkpoints import quantised_in_blocks, store
from tests.int4_checkpoints import quantised_in_four_bits
from tests.pipeline import CASES, MODELS, Nightjar
from tests.tiny_models import EXPERTS, SIZES, make_model


def sequences(num: int = 12) -> list[Sequence]:
    return [
        Sequence(i, [3 + (7 * i + 11 * k) % 250 for k in range(1 + (17 * i) % 30)],
                 SamplingParams(max_tokens=8, ignore_eos=True))
        for i in range(num)
    ]  # fmt: skip


def run(model: Path, backend: str = "transformers", **knobs: Any) -> dict[int, Completion]:
    engine = create_backend(EngineConfig(model=str(model), backend=backend, **knobs))
    engine.submit(sequences())
    found: dict[int, Completion] = {}
    while engine.num_unfinished:
        found |= {completion.seq_id: completion for completion in engine.step()}
    engine.close()
    return found


@pytest.mark.parametrize("backend", ["transformers", "paged"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_weights_stored_in_fp8_blocks_give_the_tokens_of_what_they_stand_for(
    kind, backend, tmp_path
):
    source = MODELS / "tiny-a"
    if kind == "experts":
        source = make_model(tmp_path / "source", Qwen3MoeConfig(**SIZES, **EXPERTS))
    stored, whole = quantised_in_blocks(source, tmp_path)
    found = run(stored, backend)
    assert found == run(whole, backend)
    assert found != run(source, backend)


@pytest.mark.filterwarnings("ignore")  # what gptqmodel and what it imports warn of is not ours
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_stored_in_four_bits_give_the_tokens_of_what_they_stand_for(
    method, tmp_path, capsys
):
    for package in _PACKAGES[method]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    source = make_model(tmp_path / "source", LlamaConfig(**sizes))
    stored, whole = quantised_in_four_bits(source, tmp_path, method)
    capsys.readouterr()
    found = run(stored)
    assert capsys.readouterr().out == ""  # which is the command's answer
    assert found == run(whole)
    assert found != run(source)


@pytest.mark.parametrize(
    ("settings", "backend", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "transformers", "gptq: needs gptqmodel and optimum; pip"),
        ({"quant_method": "awq", "bits": 4}, "transformers", "awq: needs gptqmodel; pip install gptqmodel"),
        ({"quant_method": "gptq", "bits": 4}, "paged", "gptq, which the paged backend cannot read; use"),
        ({"quant_method": "fp8"}, "paged", "fp8 without weight_block_size"),
        ({"quant_method": "quip"}, "transformers", "quip, which no backend reads; use the unquantised"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name_with_the_remedy(
    settings, backend, words, tmp_path, monkeypatch
):
    for package in _PACKAGES["gptq"]:
        monkeypatch.setitem(sys.modules, package, None)
    folder = store(Path(shutil.copytree(MODELS / "tiny-a", tmp_path / "model")), settings)
    with pytest.raises(EngineConfigError, match=words):
        run(folder, backend)


NO_BACKEND = "which no backend reads; use the unquantised checkpoint, or one stored as"
NEEDS_TRANSFORMERS = "which the {backend} backend cannot read; use engine.backend transformers"
CANNOT_SHARE = "which the zero backend cannot share out; use engine.backend auto"
STORED: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8 in blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "fp8": {"quant_method": "fp8", "activation_scheme": "static"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "mxfp4": {"quant_method": "mxfp4"},
    "unknown": {"bits": 4},
}
REFUSED = {
    **{
        (kind, backend): f"stored as {kind}, {NEEDS_TRANSFORMERS.format(backend=backend)}"
        for kind in ("gptq", "awq")
        for backend in ("paged", "zero")
    },
    ("bitsandbytes", "zero"): f"stored as bitsandbytes, {CANNOT_SHARE}",
    ("fp8 in blocks", "zero"): f"stored as fp8, {CANNOT_SHARE}",
    **{
        (
            "fp8",
            backend,
        ): "fp8 without weight_block_size, which is not known here; use a checkpoint in"
        for backend in ("transformers", "paged", "zero")
    },
    **{
        (kind, backend): f"stored as {kind}, {NO_BACKEND}"
        for kind in ("compressed-tensors", "modelopt", "mxfp4", "unknown")
        for backend in ("transformers", "paged", "zero")
    },
}


@pytest.mark.parametrize("backend", ["transformers", "paged", "zero"])
@pytest.mark.parametrize("kind", STORED)
def test_each_way_to_store_weights_is_read_or_refused_by_name_before_any_weight(
    kind, backend, tmp_path
):
    folder = store(Path(shutil.copytree(MODELS / "tiny-a", tmp_path / "model")), STORED[kind])
    (folder / "model.safetensors").unlink()
    config = EngineConfig(model=str(folder), backend=backend)
    words = REFUSED.get((kind, backend))
    with nullcontext() if words is None else pytest.raises(EngineConfigError, match=words):
        check_engine(check_small_files(folder), config, is_here=False)


@pytest.mark.parametrize(
    ("name", "kind"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")]
)
@pytest.mark.parametrize("backend", ["transformers", "paged", "zero"])
def test_weights_whose_config_does_not_say_that_they_are_quantised_are_refused_with_the_file_that_does(
    name, kind, backend, tmp_path
):
    folder = Path(shutil.copytree(MODELS / "tiny-a", tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(json.dumps({"bits": 4, "group_size": 128}))
    config = EngineConfig(model=str(folder), backend=backend)
    words = (
        f"{name} says that weights are stored as {kind}, and config.json has no quantization_config"
    )
    with pytest.raises(EngineConfigError, match=words):
        check_engine(check_small_files(folder), config, is_here=False)


def test_weights_of_a_part_of_the_model_that_are_quantised_are_refused(tmp_path):
    folder = Path(shutil.copytree(MODELS / "tiny-a", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {"quantization_config": STORED["gptq"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineConfigError, match="text_config has a quantization_config of its own"):
        check_engine(
            check_small_files(folder), EngineConfig(model=str(folder), backend="transformers")
        )


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_stored_quantisation_is_not_quantised_again(kind, tmp_path):
    stored, _ = quantised_in_blocks(MODELS / "tiny-a", tmp_path)
    with pytest.raises(EngineConfigError, match=f"{kind}, but .* stored as fp8 already; use none"):
        run(stored, quantization=kind)


def test_a_scale_grid_that_does_not_fit_is_refused(tmp_path):
    stored, _ = quantised_in_blocks(MODELS / "tiny-a", tmp_path)
    weights = load_file(stored / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    weights[name] = torch.ones(5, 7)
    save_file(weights, stored / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        run(stored)


@pytest.mark.parametrize("backend", ["transformers", "paged"])
def test_four_bit_weights_run_whatever_their_sizes_and_do_not_depend_on_the_batch(backend):
    pytest.importorskip("bitsandbytes")
    model = MODELS / "tiny-a"  # widths that 32 does not divide
    found = run(model, backend, quantization="nf4", max_num_seqs=8)
    assert found == run(model, "transformers", quantization="nf4", max_num_seqs=1)
    assert found != run(model)


def test_eight_bit_weights_run_on_the_paged_backend_too():
    pytest.importorskip("bitsandbytes")
    found = run(MODELS / "tiny-a", "paged", quantization="int8")
    reference = run(MODELS / "tiny-a", "transformers", quantization="int8")
    same = sum(found[i] == reference[i] for i in found)
    assert (
        same > len(found) // 2
    )  # the rest are near ties, which batches of other sizes decide otherwise


def test_bitsandbytes_asks_no_hub_for_code(caplog):
    pytest.importorskip("bitsandbytes")
    run(MODELS / "tiny-a", quantization="nf4")
    assert sys.modules.get("kernels", "untouched") is not None
    assert "kernels-community" not in caplog.text


def test_without_bitsandbytes_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EngineConfigError, match="int8: needs bitsandbytes; pip install"):
        run(MODELS / "tiny-a", quantization="int8")


def test_quantised_and_full_texts_are_never_mixed_in_one_run(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    nightjar = Nightjar(tmp_path, capsys)
    source = CASES / "A1-left-pad" / "input.parquet"
    knobs = {"run_id": "one", "engine__max_num_seqs": 8}
    done = nightjar.run("tiny-a", source, model__quantization="int8", **knobs)
    assert (done.code, len(done.rows)) == (0, 24)
    assert all(row["completion"] is not None for row in done.rows)
    record = json.loads((done.run / "run.json").read_text())
    assert record["fingerprint_fields"]["model.quantization"] == "int8"
    assert record["job"]["engine"]["max_num_seqs"] == 8
    before = pq.read_table(done.run / "completions")
    again = nightjar.run("tiny-a", source, model__quantization="none", **knobs)
    assert again.code == 2
    assert 'model.quantization was "int8", now "none"' in again.err
    assert pq.read_table(done.run / "completions").equals(before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine__offload": "nvme"}, "engine.nvme_path is not set"),
        (
            {"engine__backend": "paged", "engine__offload": "cpu"},
            "use auto, or engine.backend zero",
        ),
        ({"model__quantization": "fp8"}, "model.quantization is fp8: needs engine.backend paged"),
    ],
)
def test_what_cannot_run_ends_the_job_before_anything_is_planned(settings, words, tmp_path, capsys):
    source = CASES / "A1-left-pad" / "input.parquet"
    done = Nightjar(tmp_path, capsys).run("tiny-a", source, **settings)
    assert done.code == 2
    assert words in done.err
    assert list((tmp_path / "out").rglob("*.json")) == []
