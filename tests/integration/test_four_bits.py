"""Weights in four bits on the paged engine's fused layers, and on the model's own where they cannot be fused."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from inference.backends import check_engine, create_backend
from inference.config import EngineConfig
from inference.errors import EngineConfigError
from inference.linears import Linear4
from inference.loading import load_model
from inference.model import FusedModel, make_paged_model
from inference.model_config import model_shape
from inference.sampling import SamplingParams
from inference.sequence import Sequence
from inference.weights import check_model_folder, check_small_files
from tests.tiny_models import MODELS, SIZES, make_model

bitsandbytes = pytest.importorskip("bitsandbytes")

WIDE = {**SIZES, "hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
CONFIGS = {
    "qwen3": transformers.Qwen3Config(**WIDE),
    "qwen2": transformers.Qwen2Config(**WIDE),
    "llama": transformers.LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**WIDE, sliding_window=12),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, config) for name, config in CONFIGS.items()}


def load(folder: Path, **knobs: Any) -> Any:
    return load_model(check_model_folder(folder), EngineConfig(model=str(folder), **knobs))


def tokens(folder: Path, backend: str, **knobs: Any) -> dict[int, tuple[int, ...]]:
    engine = create_backend(EngineConfig(model=str(folder), backend=backend, **knobs))
    engine.submit(
        Sequence(i, [3 + (7 * i + 11 * k) % 250 for k in range(1 + (17 * i) % 40)],
                 SamplingParams(max_tokens=12, ignore_eos=True))
        for i in range(14)
    )  # fmt: skip
    found = {}
    while engine.num_unfinished:
        found |= {c.seq_id: c.token_ids for c in engine.step()}
    engine.close()
    return found


def stored(source: Path, folder: Path, **settings: Any) -> Path:
    """A checkpoint as bitsandbytes' users publish them."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        **{"bnb_4bit_compute_dtype": torch.float32, **settings},
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MODELS / "tiny-a" / name, folder / name)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_layers_in_four_bits_give_the_tokens_of_the_models_own(name, folders):
    model = load(folders[name], quantization="nf4")
    fused = make_paged_model(model)
    assert isinstance(fused, FusedModel)
    assert isinstance(fused._layers[0]._qkv, Linear4)
    found = tokens(folders[name], "paged", quantization="nf4")
    assert found == tokens(folders[name], "transformers", quantization="nf4")
    assert found != tokens(folders[name], "paged")


def test_weights_that_were_laid_side_by_side_are_let_go_of_at_once(folders):
    model = load(folders["qwen3"], quantization="nf4")
    kept = [weakref.ref(layer.mlp.up_proj.weight) for layer in model.model.layers]
    assert all(weight() is not None for weight in kept)
    gc.disable()  # nothing waits for it
    try:
        assert isinstance(make_paged_model(model), FusedModel)
        assert all(weight() is None for weight in kept)
    finally:
        gc.enable()


def test_a_fused_product_is_those_of_its_parts_side_by_side(folders):
    model = load(folders["llama"], quantization="nf4")
    attention = model.model.layers[0].self_attn
    rows = torch.randn(5, 128)
    with torch.inference_mode():
        parts = [p(rows) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        fused = make_paged_model(model)
        assert isinstance(fused, FusedModel)
        assert torch.equal(fused._layers[0]._qkv(rows), torch.cat(parts, dim=1))


def test_a_checkpoint_stored_in_four_bits_is_fused_like_one_quantised_when_loaded(
    folders, tmp_path
):
    folder = stored(folders["qwen3"], tmp_path / "stored")
    assert isinstance(make_paged_model(load(folder)), FusedModel)
    assert model_shape(json.loads((folder / "config.json").read_text())).is_fused
    expected = tokens(folders["qwen3"], "paged", quantization="nf4")
    assert tokens(folder, "paged") == expected == tokens(folder, "transformers")


def test_scales_stored_in_eight_bits_stand_for_the_same_numbers(folders, tmp_path):
    folder = stored(folders["qwen3"], tmp_path / "stored", bnb_4bit_use_double_quant=True)
    model = load(folder)
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested
    assert isinstance(make_paged_model(model), FusedModel)
    assert tokens(folder, "paged") == tokens(folder, "transformers")


@pytest.mark.parametrize(
    "settings",
    [
        {"llm_int8_skip_modules": ["lm_head", "model.layers.1.self_attn.k_proj"]},
        {"bnb_4bit_compute_dtype": torch.bfloat16},
    ],
    ids=["a part that is whole", "another element type"],
)
def test_what_cannot_be_laid_side_by_side_runs_on_the_models_own_layers(
    settings, folders, tmp_path
):
    folder = stored(folders["qwen3"], tmp_path / "stored", **settings)
    paged = make_paged_model(load(folder))
    assert not isinstance(paged, FusedModel)
    assert paged.can_be_captured
    if "bnb_4bit_compute_dtype" in settings:
        assert not model_shape(json.loads((folder / "config.json").read_text())).is_fused
    assert tokens(folder, "paged") == tokens(folder, "transformers")


def test_layers_in_eight_bits_stay_the_models_own_and_are_launched_anew(folders):
    paged = make_paged_model(load(folders["qwen3"], quantization="int8"))
    assert not isinstance(paged, FusedModel)
    assert not paged.can_be_captured


def test_a_layer_left_whole_is_fused_in_full_precision_beside_those_in_four_bits(folders, tmp_path):
    skipped = ["lm_head", "model.layers.0"]
    folder = stored(folders["qwen3"], tmp_path / "stored", llm_int8_skip_modules=skipped)
    paged = make_paged_model(load(folder))
    assert isinstance(paged, FusedModel)
    kinds = [type(layer._qkv).__name__ for layer in paged._layers]
    assert kinds == ["Linear", "Linear4", "Linear4"]
    assert tokens(folder, "paged") == tokens(folder, "transformers")


def test_an_output_head_in_four_bits_is_refused_with_what_runs_it(folders, tmp_path):
    folder = stored(folders["qwen3"], tmp_path / "stored", llm_int8_skip_modules=["nothing"])
    refused = pytest.raises(EngineConfigError, match="its output head quantised; use transformers")
    with refused:  # before anything is loaded
        check_engine(check_small_files(folder), EngineConfig(model=str(folder), backend="paged"))
    with refused:
        make_paged_model(load(folder))
    shape = model_shape(json.loads((folder / "config.json").read_text()))
    assert not shape.is_paged
    assert len(tokens(folder, "transformers")) == 14
