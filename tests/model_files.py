"""Small models made of random bytes, with the files and headers of real ones."""

import json
import random
import struct
from pathlib import Path


def safetensors_bytes(num_bytes: int, *, name: str = "w", seed: int = 0) -> bytes:
    """A sound safetensors file of about `num_bytes`, with one tensor of random bytes."""
    header = json.dumps(
        {name: {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
    )
    header += " " * (-len(header) % 8)
    return (
        struct.pack("<Q", len(header)) + header.encode() + random.Random(seed).randbytes(num_bytes)
    )


def write_model(folder: Path, *, num_weight_files: int = 2, weight_bytes: int = 1000) -> Path:
    """A model folder; each weight file holds `weight_bytes` of one tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], "hidden_size": 8}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    weight_map = {}
    for index in range(num_weight_files):
        name = f"model-{index + 1:05d}-of-{num_weight_files:05d}.safetensors"
        data = safetensors_bytes(weight_bytes, name=f"w{index}", seed=index)
        (folder / name).write_bytes(data)
        weight_map[f"w{index}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file's content by name, the staged manifest left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "MANIFEST.json"
    }
