"""Weights quantised to fp8 while they are read: the tokens of those quantised from the whole model, and no room for it."""

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from inference import load_weights as reader
from inference import partition_fill, quantised_loading
from inference.arriving import Arriving
from inference.config import EngineConfig
from inference.errors import EngineConfigError, ModelError
from inference.kernels import plain
from inference.layers import take_layer
from inference.loading import load_model
from inference.model import FusedModel, make_paged_model
from inference.quantised_loading import load_quantised
from inference.sampling import SamplingParams
from inference.tensor_parallel import TensorParallel
from inference.weights import check_model_folder
from tests.fp8_checkpoints import quantised_in_blocks
from tests.full_precision import measured_full_precision
from tests.paged_cases import prompts_of, run, sequences_of, settings_of, tokens
from tests.tiny_models import EXPERTS, SIZES, make_model

CPU = torch.device("cpu")
KINDS: dict[str, Any] = {
    "dense": lambda sizes: transformers.Qwen3Config(**sizes, tie_word_embeddings=False),
    "tied": lambda sizes: transformers.LlamaConfig(
        **sizes, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "experts": lambda sizes: transformers.Qwen3MoeConfig(**sizes, **EXPERTS),
    "window": lambda sizes: transformers.MistralConfig(**sizes, sliding_window=12),
    "biases": lambda sizes: transformers.Qwen2Config(
        **{name: value for name, value in sizes.items() if name != "head_dim"}
    ),
}


def saved(folder: Path, kind: str, num_layers: int = 3) -> Path:
    """Write a model of random weights and biases."""
    make_model(folder, KINDS[kind](SIZES | {"num_hidden_layers": num_layers}))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("bias"):
            tensor.normal_(std=0.2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantised_while_read(folder: Path, files: Arriving | None = None, **knobs: Any) -> FusedModel:
    config = EngineConfig(model=str(folder), quantization="fp8", **knobs)
    files = files or Arriving.whole(folder)
    return load_quantised(files, config, TensorParallel.alone(), CPU, plain)


def quantised_afterwards(folder: Path, **knobs: Any) -> Any:
    config = EngineConfig(model=str(folder), **knobs)
    return make_paged_model(load_model(check_model_folder(folder), config), is_fp8=True)


def tokens_of(model: Any) -> dict[int, Any]:
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    settings = settings_of(kv_dtype=model.dtype)
    completions, _ = run(model, sequences_of(prompts_of(8), sampling), settings)
    return tokens(completions)


def sizes_of(folder: Path) -> tuple[int, int]:
    """Return the bytes of a layer, and of all but the layers."""
    weights = load_file(folder / "model.safetensors")
    layer_bytes = sum(t.nbytes for name, t in weights.items() if "layers.1." in name)
    return layer_bytes, sum(t.nbytes for name, t in weights.items() if "layers." not in name)


def resave(folder: Path, place: Callable[[str], int]) -> Path:
    """Spread the tensors over numbered files, with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{place(name)}.safetensors" for name in weights}
    for file in set(names.values()):
        chosen = {name: tensor for name, tensor in weights.items() if names[name] == file}
        save_file(chosen, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_quantised_while_they_are_read_give_the_tokens_of_those_quantised_afterwards(
    kind, dtype, tmp_path
):
    folder = saved(tmp_path / "model", kind)
    found = quantised_while_read(folder, dtype=dtype)
    expected = quantised_afterwards(folder, dtype=dtype)
    assert found.dtype == expected.dtype
    assert found.num_weight_bytes == expected.num_weight_bytes
    assert tokens_of(found) == tokens_of(expected)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_so_do_weights_that_are_stored_in_fp8_blocks(kind, tmp_path):
    stored, _ = quantised_in_blocks(saved(tmp_path / "source", kind), tmp_path)
    assert tokens_of(quantised_while_read(stored)) == tokens_of(quantised_afterwards(stored))


def changed(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """Change the weights and the config of a model."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(weights, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def store_no_dtype(weights: dict[str, Any], config: dict[str, Any]) -> None:
    del config["dtype"]
    weights |= {name: tensor.bfloat16() for name, tensor in weights.items()}


def store_another_head(weights: dict[str, Any], config: dict[str, Any]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0)


def store_the_head_twice(weights: dict[str, Any], config: dict[str, Any]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


def store_experts_together(weights: dict[str, Any], config: dict[str, Any]) -> None:
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts"
        of = {
            kind: torch.stack([weights.pop(f"{prefix}.{e}.{kind}_proj.weight") for e in range(4)])
            for kind in ("gate", "up", "down")
        }
        weights[f"{prefix}.gate_up_proj"] = torch.cat([of["gate"], of["up"]], dim=1)
        weights[f"{prefix}.down_proj"] = of["down"]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("dense", store_no_dtype),
        ("tied", store_another_head),
        ("tied", store_the_head_twice),
        ("experts", store_experts_together),
    ],
)
def test_what_transformers_makes_of_unusual_files_is_made_of_them_here_too(kind, change, tmp_path):
    folder = changed(saved(tmp_path / "model", kind), change)
    found, expected = quantised_while_read(folder), quantised_afterwards(folder)
    assert found.dtype == expected.dtype
    assert tokens_of(found) == tokens_of(expected)


@pytest.mark.parametrize(
    ("kind", "name"), [("dense", "mlp.up_proj.weight"), ("experts", "mlp.experts.0.up_proj.weight")]
)
def test_a_weight_that_is_in_two_files_is_one_weight(kind, name, tmp_path):
    folder = saved(tmp_path / "model", kind)
    expected = tokens_of(quantised_afterwards(folder))
    twice = load_file(folder / "model.safetensors")[f"model.layers.1.{name}"]
    resave(folder, lambda name: int("layers.2" in name or "norm" in name))
    second = folder / "model-1.safetensors"
    weights = load_file(second) | {f"model.layers.1.{name}": twice}
    save_file(weights, second, metadata={"format": "pt"})
    assert tokens_of(quantised_while_read(folder)) == expected


def test_a_weight_that_is_missing_is_an_error(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = changed(saved(tmp_path / "model", "dense"), lambda weights, _: weights.pop(name))
    with pytest.raises(ModelError, match=f"1 weights with missing keys, first {name}"):
        quantised_while_read(folder)


def test_layers_that_cannot_run_in_fp8_are_refused_before_any_is_read(tmp_path):
    folder = make_model(tmp_path / "model", transformers.GemmaConfig(**SIZES))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    with pytest.raises(
        EngineConfigError, match="fp8: not available for model_type gemma; use none"
    ):
        quantised_while_read(folder)


SPREAD: dict[str, Callable[[str], int]] = {
    "a layer begun in one file and completed in the other": lambda name: int(
        "layers.1.mlp" in name or "layers.2" in name or "lm_head" in name
    ),
    "every layer in both files": lambda name: int("mlp" in name),
}


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_files_may_hold_layers_in_any_order_and_come_in_any(kind, spread, is_reversed, tmp_path):
    folder = saved(tmp_path / "model", kind)
    expected = tokens_of(quantised_afterwards(folder))
    resave(folder, SPREAD[spread])
    files = Arriving()
    files.begin(folder)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(quantised_while_read, folder, files)
        for path in sorted(folder.glob("*.safetensors"), reverse=is_reversed):
            files.add(path)
        files.finish(folder)
    assert tokens_of(loading.result()) == expected


def test_layers_are_quantised_while_other_files_are_on_their_way(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", "dense")
    expected = tokens_of(quantised_afterwards(folder))
    resave(folder, lambda name: int("layers.2" in name))
    files, taken = Arriving(), Queue[int]()

    def noted(model: Any, index: int, *others: Any) -> Any:
        taken.put(index)
        return take_layer(model, index, *others)

    monkeypatch.setattr(quantised_loading, "take_layer", noted)
    files.begin(folder)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(quantised_while_read, folder, files)
        try:
            files.add(folder / "model-0.safetensors")
            assert [taken.get(timeout=60), taken.get(timeout=60)] == [0, 1]
        finally:
            files.finish(folder)
    assert tokens_of(loading.result()) == expected


def test_files_that_come_out_of_order_are_read_in_order_so_that_layers_are_completed(tmp_path):
    folder = saved(tmp_path / "model", "dense", num_layers=8)
    layer_bytes, beside = sizes_of(folder)

    def place(name: str) -> int:
        """Each layer is in two files."""
        layer = re.search(r"layers\.(\d+)", name)
        return int(layer[1]) + ("mlp" in name) if layer else 0

    resave(folder, place)
    files = Arriving()
    files.begin(folder)
    for number in range(1, 9, 2):
        files.add(folder / f"model-{number}.safetensors")
    others = threading.Timer(0.5, files.finish, [folder])
    others.start()
    with measured_full_precision() as found:
        quantised_while_read(folder, files)
    others.join()
    assert max(found) < beside + 3 * layer_bytes


@pytest.mark.parametrize("method", ["safetensors", "parallel"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_no_more_than_a_few_layers_are_in_full_precision_at_once(
    kind, method, tmp_path, monkeypatch
):
    folder = saved(tmp_path / "model", kind, num_layers=8)
    layer_bytes, beside = sizes_of(folder)
    ahead = 0
    if method == "parallel":
        ahead = layer_bytes
        monkeypatch.setattr(reader, "MAX_AHEAD_BYTES", ahead)
        by_threads = partial(
            reader.load_weights, method="parallel", num_threads=2, buffer_bytes=20_000
        )
        monkeypatch.setattr(partition_fill, "load_weights", by_threads)
    with measured_full_precision() as found:
        model = quantised_while_read(folder)
    assert max(found) < beside + ahead + 2 * layer_bytes
    assert found[-1] < beside  # less by the head, more by the layers' norms and scales
    assert tokens_of(model) == tokens_of(quantised_afterwards(folder))
