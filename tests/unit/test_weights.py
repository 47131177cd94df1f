"""Only whole, safe model folders are used, and what is wrong is named."""

import hashlib
import json
import shutil
import struct
from pathlib import Path

import pytest

from inference.errors import ModelError
from inference.weights import INDEX_NAME, check_model_folder, check_weight_file

MODELS = Path(__file__).parents[1] / "data" / "models"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(MODELS / "tiny-a", tmp_path / "model"))


@pytest.fixture
def parts(tmp_path):
    return Path(shutil.copytree(MODELS / "tiny-tied-sharded", tmp_path / "model"))


def write_weights(path: Path, header: object, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def tensor(begin: int, end: int, **fields: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **fields}


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_model_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_folder_is_described(folder):
    found = check_model_folder(folder)
    assert found.config["model_type"] == "qwen3"
    assert [file.path.name for file in found.weight_files] == ["model.safetensors"]
    assert found.num_weight_bytes == (folder / "model.safetensors").stat().st_size
    assert "model.embed_tokens.weight" in found.weight_files[0].tensor_names


def test_a_folder_in_parts_lists_them_all(parts):
    names = [file.path.name for file in check_model_folder(str(parts)).weight_files]
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_a_missing_part_is_named():
    assert "model-00002-of-00003.safetensors" in refusal(MODELS / "tiny-a-missing-shard")


def test_no_folder_and_no_config_are_named(tmp_path, folder):
    assert "no such model folder" in refusal(tmp_path / "none")
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


def test_a_folder_without_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer file" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_pickled_weights_alone_are_refused_with_the_remedy(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    message = refusal(folder)
    assert name in message
    assert "convert the model to safetensors" in message


def test_pickled_weights_beside_safetensors_do_no_harm(folder):
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    check_model_folder(folder)


def test_no_weights_at_all_is_said(folder):
    (folder / "model.safetensors").unlink()
    assert "no .safetensors files" in refusal(folder)


def test_parts_without_an_index_are_refused(parts):
    (parts / INDEX_NAME).unlink()
    assert INDEX_NAME in refusal(parts)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_in_the_folder_is_refused(folder, name):
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    message = refusal(folder)
    assert f"{name}: has auto_map" in message
    assert f"model.allowed_code: [{digest}] in the job, or --allow-code {digest}" in message
    check_model_folder(folder, [digest])
    (folder / name).write_text((folder / name).read_text() + " ")
    with pytest.raises(ModelError, match="has auto_map"):
        check_model_folder(folder, [digest])


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
def test_a_truncated_weight_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors" in refusal(folder)


def test_a_weight_file_with_more_than_it_says_is_refused(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "its header says" in refusal(folder)


@pytest.mark.parametrize(
    ("header", "num_bytes"),
    [
        (b"not json", 0),
        (b"[]", 0),
        (b'{"w": 3}', 0),
        (b"{" * 5000, 0),
        ({"w": {"dtype": "U8", "shape": [4]}}, 4),
        ({"w": tensor(0, 4, dtype="X9")}, 4),
        ({"w": tensor(0, 4, shape=[5])}, 4),
        ({"w": tensor(0, 4, shape=["4"], data_offsets=["a", 4])}, 4),
        ({"w": tensor(1, 4)}, 4),
        ({"a": tensor(0, 4), "b": tensor(2, 6)}, 6),
        ({"a": tensor(0, 4), "b": tensor(5, 6)}, 6),
        ({"w": tensor(0, 4)}, 3),
        ({"w": tensor(0, 4)}, 5),
        ({"w": tensor(4, 0, shape=[4])}, 4),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, num_bytes):
    path = write_weights(tmp_path / "w.safetensors", header, bytes(num_bytes))
    with pytest.raises(ModelError, match=r"w\.safetensors"):
        check_weight_file(path)


def test_a_header_larger_than_the_file_is_not_read(tmp_path):
    path = tmp_path / "w.safetensors"
    for claimed in (99, 100_000_001, 2**63):
        path.write_bytes(struct.pack("<Q", claimed) + b"{}")
        with pytest.raises(ModelError, match=f"header of {claimed} bytes"):
            check_weight_file(path)


def test_a_right_header_passes(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": tensor(4, 12, dtype="F32", shape=[2]),
        "a": tensor(0, 4),
        "nothing": tensor(4, 4),
        "scalar": tensor(12, 14, dtype="BF16", shape=[]),
    }
    path = write_weights(tmp_path / "w.safetensors", header, bytes(14))
    assert set(check_weight_file(path).tensor_names) == {"a", "b", "nothing", "scalar"}


@pytest.mark.parametrize(
    "weight_map", [None, {}, {"w": "../elsewhere.safetensors"}, {"w": "model.bin"}]
)
def test_an_index_that_names_anything_but_a_weight_file_beside_it_is_refused(folder, weight_map):
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert INDEX_NAME in refusal(folder)


def test_a_tensor_that_is_not_where_the_index_says_is_named(parts):
    index = json.loads((parts / INDEX_NAME).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    (parts / INDEX_NAME).write_text(json.dumps(index))
    assert "model.extra.weight" in refusal(parts)


def test_the_content_id_follows_the_content_not_the_place(folder, tmp_path):
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    (moved / "README.md").write_text("notes change nothing")
    assert check_model_folder(moved).content_id == check_model_folder(folder).content_id


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_the_content_id_changes_with_every_small_file(folder, name):
    before = check_model_folder(folder).content_id
    with (folder / name).open("a") as file:
        file.write("\n")
    assert check_model_folder(folder).content_id != before


def test_the_content_id_changes_with_a_weight(folder):
    before = check_model_folder(folder).content_id
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert check_model_folder(folder).content_id != before


def test_a_large_weight_file_is_sampled_from_end_to_end(folder):
    num_bytes = 300 * 64 * 1024 + 17
    ids = set()
    for changed in (None, 0, num_bytes - 1):
        data = bytearray(num_bytes)
        if changed is not None:
            data[changed] = 1
        write_weights(folder / "model.safetensors", {"w": tensor(0, num_bytes)}, bytes(data))
        ids.add(check_model_folder(folder).content_id)
    assert len(ids) == 3
