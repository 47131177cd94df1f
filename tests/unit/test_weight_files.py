import hashlib
import json
import struct
from pathlib import Path

import pytest

from storage.errors import BadInput, CorruptObject
from storage.weight_files import (
    check_safetensors,
    check_small_files,
    read_sha256_sums,
    safe_path,
    select,
)
from tests.model_files import safetensors_bytes, write_model

HERE = "s3://b/m/"


def test_data_is_staged_and_code_is_left_where_it_is() -> None:
    names = [
        "model.safetensors",
        "config.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "modeling_x.py",
        "pytorch_model.bin",
        "weights.tar.gz",
        "README.md",
        ".gitattributes",
        "original/consolidated.safetensors",
        "additional_chat_templates/tools.jinja",
    ]
    files, skipped = select(names, source=HERE)
    assert sorted(files) == [
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.model",
    ]
    assert set(files) | set(skipped) == set(names)
    assert files[-1] == "model.safetensors", "weights come last"


def test_a_model_of_pickles_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"pytorch_model\.bin.*convert them to safetensors"):
        select(["config.json", "pytorch_model.bin"], source=HERE)


@pytest.mark.parametrize("names", [["config.json"], ["model.safetensors"], []])
def test_a_model_without_weights_or_config_is_refused(names: list[str]) -> None:
    with pytest.raises(BadInput, match=r"no (\.safetensors|config\.json)"):
        select(names, source=HERE)


@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/x.json", "a/../../x.json", "a\0.json", "a\\b.json"]
)
def test_a_name_that_leads_outside_the_folder_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="unsafe"):
        select(["config.json", "model.safetensors", name], source=HERE)


def test_a_link_that_leads_outside_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sub").symlink_to(tmp_path)
    assert safe_path(tmp_path / "model", "config.json") == tmp_path / "model" / "config.json"
    with pytest.raises(BadInput, match="leads outside"):
        safe_path(tmp_path / "model", "sub/x.jinja")


def test_the_same_weights_in_a_second_layout_are_not_moved_twice() -> None:
    indexed = ["config.json", "model.safetensors.index.json", "model-1.safetensors"]
    assert (
        "consolidated.safetensors"
        in select([*indexed, "consolidated.safetensors"], source=HERE).skipped
    )
    single = ["config.json", "model.safetensors", "consolidated.safetensors"]
    assert select(single, source=HERE).files == ["config.json", "model.safetensors"]


def test_an_index_that_names_a_missing_file_is_refused_with_the_file(tmp_path: Path) -> None:
    write_model(tmp_path, num_weight_files=3)
    names = [path.name for path in tmp_path.iterdir()]
    names.remove("model-00002-of-00003.safetensors")
    with pytest.raises(BadInput, match=r"names model-00002-of-00003\.safetensors.*1 of 3"):
        check_small_files(tmp_path, names, source=HERE)


def test_only_the_weight_files_of_the_index_are_needed(tmp_path: Path) -> None:
    write_model(tmp_path, num_weight_files=2)
    names = [path.name for path in tmp_path.iterdir()] + ["adapter.safetensors"]
    assert check_small_files(tmp_path, names, source=HERE) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_config_that_asks_for_python_is_refused_unless_this_very_file_is_allowed(
    tmp_path: Path, name: str
) -> None:
    write_model(tmp_path)
    (tmp_path / name).write_text(json.dumps({"auto_map": {"AutoModel": "modeling_x.X"}}))
    names = [path.name for path in tmp_path.iterdir()]
    digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    with pytest.raises(BadInput, match=f"auto_map.*{digest}"):
        check_small_files(tmp_path, names, source=HERE)
    check_small_files(tmp_path, names, source=HERE, allowed_code={digest})


def test_a_config_that_is_not_json_is_corrupt(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptObject, match=r"config\.json is not JSON"):
        check_small_files(tmp_path, ["config.json"], source=HERE)


def _with_header(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _span(start: int, stop: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too few"),
        (struct.pack("<Q", 1 << 40) + b"x" * 100, "header of"),
        (struct.pack("<Q", 10) + b"not json!!", "cannot be read"),
        (safetensors_bytes(100)[:-1], "header promises"),
        (safetensors_bytes(100) + b"x", "header promises"),
        (_with_header({"a": _span(0, 4), "b": _span(5, 8)}, b"x" * 8), "not contiguous at byte 4"),
        (_with_header({"a": _span(0, 4), "b": _span(2, 8)}, b"x" * 8), "not contiguous"),
        (_with_header({"a": {"dtype": "U8"}}, b""), "cannot be read"),
        (_with_header([1], b""), "cannot be read"),
    ],
)
def test_an_unsound_safetensors_file_is_corrupt(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptObject, match=message):
        check_safetensors(path, name="m.safetensors")


def test_a_sound_safetensors_file_passes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(
        _with_header({"__metadata__": {"a": "b"}, "b": _span(4, 8), "a": _span(0, 4)}, b"x" * 8)
    )
    check_safetensors(path, name="m.safetensors")


def test_sha256_sums_are_read_as_sha256sum_writes_them() -> None:
    digest = "ab" * 32
    sums = read_sha256_sums(f"{digest}  a.json\n{digest} *./b c.txt\n\n", source=HERE)
    assert sums == {"a.json": digest, "b c.txt": digest}
    with pytest.raises(CorruptObject, match="SHA256SUMS"):
        read_sha256_sums("hello world", source=HERE)
