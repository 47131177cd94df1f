"""Loading a model whose files are still on their way, on real small models."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inference.arriving import Arriving
from inference.config import EngineConfig
from inference.errors import ModelError
from inference.lazy_weights import LazyWeights
from inference.load_weights import load_weights
from inference.loading import load_arriving, load_model
from inference.weight_reader import Slice
from inference.weights import check_model_folder

MODELS = Path(__file__).parents[1] / "data" / "models"
CPU = torch.device("cpu")


class Filler:
    """Fills an `Arriving` with a model file by file, when told."""

    def __init__(self, folder: Path) -> None:
        self.files = Arriving()
        self._folder = folder

    def begin(self) -> None:
        self.files.begin(self._folder)

    def add(self, *names: str) -> None:
        for name in names:
            self.files.add(self._folder / name)


def config(path: Path, dtype: str = "auto") -> EngineConfig:
    return EngineConfig(model=str(path), backend="paged", dtype=dtype)  # type: ignore[arg-type]


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    found: list[object] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    for model in (found, expected):  # where there is a GPU they may be there
        model.to(CPU)
    left, right = found.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype, name
        assert torch.equal(left[name], tensor), name
    for (name, buffer), (_, wanted) in zip(
        found.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, wanted), name
    assert not found.training


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny-a", "tiny-tied-sharded"])
def test_a_model_loaded_while_it_arrives_is_the_model(name: str, dtype: str) -> None:
    path = MODELS / name
    filler = Filler(path)
    thread, found = in_thread(lambda: load_arriving(filler.files, config(path, dtype), CPU))
    filler.begin()
    for file in sorted(path.glob("*.safetensors"), reverse=True):
        assert not found
        filler.add(file.name)
    thread.join(30)
    plain = load_model(check_model_folder(path), config(path, dtype))
    assert_same(found[0], plain)  # type: ignore[arg-type]


def test_every_way_of_reading_gives_the_same_parameters() -> None:
    path = MODELS / "tiny-tied-sharded"
    folder = check_model_folder(path)
    paths = [file.path for file in folder.weight_files]
    plain, parallel = (dict(load_weights(paths, method=m)) for m in ("safetensors", "parallel"))
    with LazyWeights(Arriving.whole(path), device=CPU) as weights:
        lazy = {name: tensor[...] for name, tensor in weights.state().items()}
    for found in (parallel, lazy):
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_the_first_file_is_loaded_before_the_last_one_is_there() -> None:
    path = MODELS / "tiny-tied-sharded"
    first, second, *_ = sorted(file.name for file in path.glob("*.safetensors"))
    tensors = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    mine, other = (next(n for n, file in tensors.items() if file == f) for f in (first, second))
    filler = Filler(path)
    filler.begin()
    filler.add(first)
    with LazyWeights(filler.files, device=CPU) as weights:
        state = weights.state()
        assert state[mine][...].numel()
        thread, found = in_thread(lambda: state[other][...])
        thread.join(0.1)
        assert not found, "the second file is not there"
        filler.add(second)
        thread.join(30)
        assert isinstance(found[0], torch.Tensor)


def test_a_rank_is_given_its_slices_of_what_arrives() -> None:
    path = MODELS / "tiny-a"
    name = "model.embed_tokens.weight"
    slicer = lambda n, shape: Slice(0, 0, shape[0] // 2) if n == name else None  # noqa: E731
    with LazyWeights(Arriving.whole(path), device=CPU, slicer=slicer) as weights:
        half = weights.state()[name][...]
    whole = dict(load_weights([path / "model.safetensors"]))[name]
    assert torch.equal(half, whole[: len(whole) // 2])


def test_experts_that_transformers_merges_are_given_to_it_one_by_one(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    moe = transformers.Qwen3MoeConfig(
        vocab_size=64, num_experts=4, num_experts_per_tok=2, dtype=torch.float32, **sizes, **heads
    )
    transformers.Qwen3MoeForCausalLM(moe).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    filler = Filler(tmp_path)
    filler.begin()
    filler.add("model.safetensors")
    plain = load_model(check_model_folder(tmp_path), config(tmp_path))
    assert_same(load_arriving(filler.files, config(tmp_path), CPU), plain)


class Spoiled(Exception):
    """What a filler may die of."""


@pytest.mark.parametrize("after", [0, 1])
def test_the_error_of_who_fills_the_folder_ends_the_loading(after: int) -> None:
    path = MODELS / "tiny-tied-sharded"
    filler = Filler(path)
    thread, found = in_thread(lambda: load_arriving(filler.files, config(path), CPU))
    if after:
        filler.begin()
        filler.add(min(file.name for file in path.glob("*.safetensors")))
    filler.files.fail(Spoiled("a file is damaged"))
    thread.join(30)
    assert isinstance(found[0], Spoiled)


def test_a_tensor_of_the_index_that_is_in_no_file_is_named(tmp_path: Path) -> None:
    for file in (MODELS / "tiny-tied-sharded").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.layers.0.extra"] = names[0]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    filler = Filler(tmp_path)
    filler.begin()
    filler.add(*names)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.extra named by the index"):
        load_arriving(filler.files, config(tmp_path), CPU)


def test_a_model_that_moves_while_it_is_loaded_is_an_error(tmp_path: Path) -> None:
    files = Arriving()
    files.begin(tmp_path / "a")
    with pytest.raises(ModelError, match="moved"):
        files.begin(tmp_path / "b")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["tiny-a", "tiny-tied-sharded"])
def test_a_model_on_the_device_is_the_one_transformers_loads(name: str) -> None:
    path = MODELS / name
    device = torch.device("cuda:0")
    found = load_arriving(Arriving.whole(path), config(path), device)
    torch.cuda.synchronize()
    assert_same(found, load_model(check_model_folder(path), config(path), {"": device}))
