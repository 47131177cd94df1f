"""Weights: is this folder a model we can load, and which one is it? Standard library only.

A folder is used only if it holds `config.json` and whole `.safetensors` files. Pickled weights and models
that bring their own Python code are refused: loading either runs code from the folder. A config file whose SHA-256 is
in `allowed_code` may name code, which is not run: the class that transformers ships is loaded.

Layout of a safetensors file: 8 bytes N (little endian), N bytes of JSON header, then the tensors' bytes,
each at the `data_offsets` its header entry gives, without gaps.
"""

import hashlib
import json
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.content_id import WeightSample, content_id, counts, sample_spans
from inference.errors import ModelError
from inference.weight_header import check_header

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
_MAX_SMALL_FILE_BYTES = 100_000_000
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One checked `.safetensors` file."""

    path: Path
    num_bytes: int
    header: bytes = field(repr=False)
    """The JSON header as it is in the file."""

    tensor_names: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class SmallFiles:
    """A folder whose config and tokenizer passed every check; weights may still be on their way."""

    path: Path
    config: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class SampledFolder(SmallFiles):
    """A folder of small files whose model is known, though its weights are elsewhere."""

    content_id: str
    num_weight_bytes: int


@dataclass(frozen=True, slots=True)
class ModelFolder(SmallFiles):
    """A folder that passed every check."""

    weight_files: tuple[WeightFile, ...]
    content_id: str
    """64 hex digits that change when the model does; see `content_id_of`."""

    @property
    def num_weight_bytes(self) -> int:
        """Size of all weight files together."""
        return sum(file.num_bytes for file in self.weight_files)


def check_model_folder(path: str | Path, allowed_code: Collection[str] = ()) -> ModelFolder:
    """Return what the folder holds, having read every header and no weights but a sample.

    Raises:
        ModelError: it is not a whole, safe model; the message names the file.
    """
    small = check_small_files(path, allowed_code)
    folder = small.path
    weight_files = tuple(check_weight_file(folder / name) for name in _weight_file_names(folder))
    _check_index(folder, weight_files)
    return ModelFolder(folder, small.config, weight_files, content_id_of(folder, weight_files))


def check_small_files(path: str | Path, allowed_code: Collection[str] = ()) -> SmallFiles:
    """Return what the folder holds besides weights.

    Raises:
        ModelError: the config or the tokenizer is missing, unreadable, or asks for code.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(
            f"{path}: no such model folder; give a local one that holds config.json, such as "
            "`nightjar stage hf://ORG/REPO` brings"
        )
    config = _read_json(folder / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        refuse_code(folder / name, allowed_code)
    if not any((folder / name).is_file() for name in _TOKENIZER_NAMES):
        # transformers would make up an empty one.
        raise ModelError(
            f"{folder}: no tokenizer file; add {_TOKENIZER_NAMES[0]} of the same model"
        )
    return SmallFiles(folder, config)


def indexed_tensors(folder: Path) -> dict[str, str] | None:
    """Return file name by tensor name, as the index says; None without an index.

    Raises:
        ModelError: the index cannot be read, or names what is no weight file beside it.
    """
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        return None
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index_path}: has no weight_map; fetch it again")
    tensors = {str(tensor): str(name) for tensor, name in weight_map.items()}
    for name in tensors.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index_path}: names {name!r}, not a .safetensors file beside it")
    return tensors


def indexed_bytes(folder: Path) -> int:
    """Return the size of all tensors, as the index says; 0 where it does not."""
    index_path = folder / INDEX_NAME
    metadata = _read_json(index_path).get("metadata") if index_path.exists() else None
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return size if isinstance(size, int) else 0


def check_weight_file(path: Path) -> WeightFile:
    """Return the file's header, having checked that the file is exactly as long as the header says.

    Raises:
        ModelError: it is missing, empty, truncated, too long, or its header is not one.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ModelError(
                    f"{path}: {num_bytes} bytes are no safetensors file; fetch it again"
                )
            (num_header_bytes,) = struct.unpack("<Q", prefix)
            if num_header_bytes > MAX_HEADER_BYTES or 8 + num_header_bytes > num_bytes:
                raise ModelError(
                    f"{path}: header of {num_header_bytes} bytes in a file of {num_bytes}: "
                    f"truncated or not safetensors; fetch it again"
                )
            header = file.read(num_header_bytes)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: weight file is missing; fetch the whole model again") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    return _weight_file(path, num_bytes, header)


def check_sampled_folder(
    path: str | Path, samples: Iterable[WeightSample], allowed_code: Collection[str] = ()
) -> SampledFolder:
    """Return what a model is whose small files are in a folder and whose weights were only sampled.

    Samples are taken one by one, in the order of their names, and not kept.

    Raises:
        ModelError: as `check_model_folder`.
    """
    small = check_small_files(path, allowed_code)
    files: list[WeightFile] = []

    def seen() -> Iterator[WeightSample]:
        for sample in samples:
            path = small.path / sample.name
            files.append(_weight_file(path, sample.num_bytes, sample.header))
            yield sample

    model_id = content_id(_small_files(small.path), seen())
    _check_index(small.path, files)
    return SampledFolder(small.path, small.config, model_id, sum(f.num_bytes for f in files))


def content_id_of(folder: Path, weight_files: tuple[WeightFile, ...]) -> str:
    """Return the id of a whole model folder; see `inference.content_id`."""
    return content_id(_small_files(folder), map(_sample, weight_files))


def _small_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.iterdir()):
        if counts(path.name) and path.is_file():
            yield path.name, _read_small_file(path)


def _weight_file(path: Path, num_bytes: int, header: bytes) -> WeightFile:
    tensor_names, num_data_bytes = check_header(path, header)
    expected = 8 + len(header) + num_data_bytes
    if num_bytes != expected:
        raise ModelError(
            f"{path}: {num_bytes} bytes, its header says {expected}: truncated or changed; fetch it again"
        )
    return WeightFile(path, num_bytes, header, tensor_names)


def _sample(weight_file: WeightFile) -> WeightSample:
    blocks = []
    with weight_file.path.open("rb") as file:
        for start, end in sample_spans(weight_file.num_bytes, len(weight_file.header)):
            file.seek(start)
            blocks.append(file.read(end - start))
    return WeightSample(weight_file.path.name, weight_file.num_bytes, weight_file.header, blocks)


def _weight_file_names(folder: Path) -> list[str]:
    """Return the names of the files to load, in order: the index's, else the one, else all there are."""
    tensors = indexed_tensors(folder)
    if tensors is not None:
        names = sorted(set(tensors.values()))
        for name in names:
            if not (folder / name).is_file():
                raise ModelError(
                    f"{folder}: weight file {name} named by {INDEX_NAME} is missing; fetch it"
                )
        return names
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if found:
        raise ModelError(
            f"{folder}: {len(found)} .safetensors files but neither model.safetensors nor {INDEX_NAME}; "
            f"fetch the whole model"
        )
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED_SUFFIXES)
    if pickled:
        raise ModelError(
            f"{folder}: weights are pickled ({pickled[0]}), and loading them can run code; "
            f"convert the model to safetensors"
        )
    raise ModelError(f"{folder}: no .safetensors files; give a folder that holds the weights")


def _check_index(folder: Path, weight_files: Iterable[WeightFile]) -> None:
    """Every tensor the index places in a file must be in it."""
    names_of = {file.path.name: set(file.tensor_names) for file in weight_files}
    for tensor_name, file_name in (indexed_tensors(folder) or {}).items():
        if tensor_name not in names_of[file_name]:
            raise ModelError(
                f"{folder / file_name}: tensor {tensor_name} named by {INDEX_NAME} is not in it; "
                f"fetch the whole model again"
            )


def refuse_code(path: Path, allowed_code: Collection[str]) -> None:
    """Refuse a config file that names code of the model's own, unless its SHA-256 is among the allowed.

    Raises:
        ModelError: with that SHA-256; or the file is there and cannot be read.
    """
    if not path.exists() or "auto_map" not in _read_json(path):
        return
    digest = hashlib.sha256(_read_small_file(path)).hexdigest()
    if digest not in allowed_code:
        raise ModelError(
            f"{path}: has auto_map, code of the model's own, which is never run; use a model whose class "
            f"transformers ships, or, to load the shipped class in its place, give "
            f"model.allowed_code: [{digest}] in the job, or --allow-code {digest}"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read_small_file(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: not valid JSON ({type(error).__name__}); fetch it again"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds {type(found).__name__}, expected a JSON object")
    return found


def _read_small_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_SMALL_FILE_BYTES:
            raise ModelError(
                f"{path}: {path.stat().st_size} bytes, at most {_MAX_SMALL_FILE_BYTES}"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(
            f"{path.parent}: {path.name} is missing; give a whole model folder"
        ) from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
