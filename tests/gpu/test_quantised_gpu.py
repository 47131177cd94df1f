"""Quantised weights on a device: bitsandbytes as transformers runs it, and fp8 made while the weights are read."""

import gc
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from inference import load_weights
from inference.arriving import Arriving
from inference.backends import create_backend
from inference.config import EngineConfig
from inference.model import FusedModel, make_paged_model
from inference.quantised_loading import load_quantised
from inference.sampling import SamplingParams
from inference.sequence import Sequence
from inference.tensor_parallel import TensorParallel
from tests.benchmarks.random_model import write_folder
from tests.paged_cases import model_of, prompts_of, run, sequences_of, settings_of, tokens
from tests.tiny_models import MODELS, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUM_ROWS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    return make_model(tmp_path_factory.mktemp("model"), config)


def first_tokens(model: Path, backend_name: str, quantization: str) -> list[int]:
    """Greedy first tokens, one row at a time: int8 looks at the whole batch."""
    backend = create_backend(
        EngineConfig(
            model=str(model),
            backend=backend_name,
            quantization=quantization,
            dtype="bfloat16",
            max_num_seqs=16,
            max_model_len=128,
        )
    )
    found = []
    try:
        for i in range(NUM_ROWS):
            sampling = SamplingParams(max_tokens=1, ignore_eos=True)
            backend.submit([Sequence(i, [3 + (7 * i + 11 * k) % 250 for k in range(20)], sampling)])
            while backend.num_unfinished:
                found += [c.token_ids[0] for c in backend.step()]
    finally:
        backend.close()
    return found


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_weights_mean_the_same_to_both_engines(quantization, model):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    expected = first_tokens(model, "transformers", quantization)
    found = first_tokens(model, "paged", quantization)
    # bf16 rounds attention differently in the two engines: a near tie may fall the other way
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    assert same >= NUM_ROWS - 4, (found, expected)


def test_steps_of_nf4_weights_replayed_as_graphs_give_the_tokens_of_steps_launched_anew(model):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    found = []
    for enforce_eager in (False, True):
        backend = create_backend(
            EngineConfig(
                model=str(model),
                backend="paged",
                quantization="nf4",
                dtype="bfloat16",
                max_num_seqs=16,
                max_model_len=256,
                enforce_eager=enforce_eager,
            )
        )
        sampling = SamplingParams(max_tokens=40, ignore_eos=True)
        backend.submit(
            Sequence(i, [3 + (7 * i + 11 * k) % 250 for k in range(5 + 3 * i)], sampling)
            for i in range(40)
        )
        of_run = {}
        while backend.num_unfinished:
            of_run.update({c.seq_id: c.token_ids for c in backend.step()})
        backend.close()
        found.append([of_run[i] for i in range(40)])
    # Which product bitsandbytes picks goes by the step's size, which graphs pad: near ties may fall the other way.
    first = [[token_ids[0] for token_ids in rows] for rows in found]
    assert sum(a == b for a, b in zip(*first, strict=True)) >= 38
    assert sum(a == b for a, b in zip(*found, strict=True)) >= 20, found


def quantised_while_read(folder: Path) -> FusedModel:
    from inference.kernels import fused

    config = EngineConfig(model=str(folder), quantization="fp8", dtype="bfloat16")
    files, device = Arriving.whole(folder), torch.device("cuda", torch.cuda.current_device())
    return load_quantised(files, config, TensorParallel.alone(), device, fused)


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_layers_quantised_while_they_are_read_are_those_quantised_in_place(family, tmp_path):
    from inference.kernels import fused

    model_of(family).bfloat16().save_pretrained(tmp_path)
    shutil.copy(MODELS / "tiny-a" / "tokenizer.json", tmp_path)
    sequences = sequences_of(prompts_of(20))
    settings = settings_of(
        max_num_seqs=16,
        block_size=16,
        min_step_tokens=8,
        max_num_blocks=400,
        kv_dtype=torch.bfloat16,
    )
    found, _ = run(quantised_while_read(tmp_path), sequences, settings)
    # Read, not moved: `bfloat16()` rounds the rotary frequencies too.
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    in_place = make_paged_model(whole.cuda(), fused, is_fp8=True)
    expected, _ = run(in_place, sequences, settings)
    assert tokens(found) == tokens(expected)


def test_the_device_never_holds_more_than_what_is_quantised_and_a_few_layers(tmp_path, monkeypatch):
    ahead = 128 << 20
    monkeypatch.setattr(load_weights, "MAX_AHEAD_BYTES", ahead)
    config = transformers.Qwen3Config(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    folder = write_folder(tmp_path / "model", config, is_random=True)
    layer_bytes = 2 * 2048 * (2 * 16 * 128 + 2 * 8 * 128 + 3 * 8192)
    whole = (folder / "model.safetensors").stat().st_size
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = quantised_while_read(folder)
    torch.cuda.synchronize()
    peak, left = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    print(f"{whole / 1e9:.2f} GB of weights: {left / 1e9:.2f} GB in fp8, {peak / 1e9:.2f} at most")
    assert model.num_weight_bytes <= left < 0.53 * whole
    assert peak < left + ahead + 4 * layer_bytes < 0.9 * whole
