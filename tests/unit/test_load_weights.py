import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inference import load_weights as module
from inference.errors import ModelError
from inference.load_weights import default_threads, load_weights
from inference.weight_movers import BUFFER_BYTES
from inference.weight_reader import Slice, WeightFileReader
from tests.processes import wait_for

METHODS = ["safetensors", "parallel"]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "big": torch.randn(300, 70, generator=generator).to(torch.bfloat16),
        "bias": torch.randn(70, generator=generator),
        "half": torch.randn(5, 6, 8, generator=generator).to(torch.float16),
        "scale": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "ids": torch.arange(1000, dtype=torch.int64),
        "mask": torch.tensor([True, False, True]),
        "fp8": torch.randn(33, generator=generator).to(torch.float8_e4m3fn),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }


@pytest.fixture
def paths(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> list[Path]:
    names = list(tensors)
    files = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file, {"format": "pt"})
    return [tmp_path / file for file in files]


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(
        found.reshape(-1).view(torch.uint8), expected.contiguous().reshape(-1).view(torch.uint8)
    )


@pytest.fixture(params=[BUFFER_BYTES, 4096 * 3])
def buffer_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Once with buffers that hold any tensor here, once with buffers that hold few."""
    monkeypatch.setattr(module, "MAX_AHEAD_BYTES", 10_000)
    return int(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_arrives_as_it_was_saved(
    paths: list[Path], tensors: dict[str, torch.Tensor], method: str, buffer_bytes: int
) -> None:
    found = dict(load_weights(paths, method=method, buffer_bytes=buffer_bytes))  # type: ignore[arg-type]
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert_equal(found[name], tensor)


def test_both_ways_give_the_same_order(paths: list[Path]) -> None:
    orders = [[name for name, _ in load_weights(paths, method=m)] for m in METHODS]  # type: ignore[arg-type]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "part",
    [Slice(0, 0, 150), Slice(0, 299, 300), Slice(1, 0, 35), Slice(1, 35, 70), Slice(1, 69, 70)],
)
def test_a_rank_gets_its_slice_and_whole_tensors_otherwise(
    paths: list[Path],
    tensors: dict[str, torch.Tensor],
    method: str,
    part: Slice,
    buffer_bytes: int,
) -> None:
    slicer: Callable[[str, tuple[int, ...]], Slice | None]
    slicer = lambda name, shape: part if name == "big" else None  # noqa: E731
    found = dict(
        load_weights(paths, method=method, slicer=slicer, buffer_bytes=buffer_bytes)  # type: ignore[arg-type]
    )
    dim, start, stop = part
    assert_equal(found["big"], tensors["big"].narrow(dim, start, stop - start))
    assert_equal(found["ids"], tensors["ids"])


@pytest.mark.parametrize("method", METHODS)
def test_tensors_are_loaded_into_the_destination(
    paths: list[Path], tensors: dict[str, torch.Tensor], method: str
) -> None:
    mine = torch.zeros(300, 70, dtype=torch.bfloat16)

    def destination(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        return mine if name == "big" else None

    found = dict(load_weights(paths, method=method, destination=destination))  # type: ignore[arg-type]
    assert found["big"].data_ptr() == mine.data_ptr()
    assert_equal(mine, tensors["big"])


@pytest.mark.parametrize("method", METHODS)
def test_a_truncated_file_is_named(paths: list[Path], method: str) -> None:
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"b\.safetensors"):
        list(load_weights(paths, method=method))  # type: ignore[arg-type]


def test_a_file_cut_while_it_is_read_is_an_error_not_garbage(paths: list[Path]) -> None:
    reader = WeightFileReader(paths[0], direct=False)
    os.truncate(paths[0], 100)
    with pytest.raises(ModelError, match=r"a\.safetensors: ends at byte"):
        reader.read(0, [memoryview(bytearray(200))])
    reader.close()


def test_a_slice_across_rows_of_a_file_that_was_cut_is_an_error_not_the_end_of_the_process(
    paths: list[Path],
) -> None:
    reader = WeightFileReader(paths[0], direct=False)
    entry = next(entry for entry in reader.entries if entry.name == "big")
    os.truncate(paths[0], entry.offset + 100)
    with pytest.raises(ModelError, match=r"a\.safetensors: ends at byte"):
        reader.mapped(entry)
    reader.close()


def test_whoever_stops_early_leaves_nothing_running(paths: list[Path]) -> None:
    weights = load_weights(paths, method="parallel")
    next(weights)
    weights.close()  # type: ignore[attr-defined]
    assert list(weights) == []


def test_reads_past_the_page_cache_are_the_same_bytes(paths: list[Path]) -> None:
    data = paths[0].read_bytes()
    os.sync()
    fd = os.open(paths[0], os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    reader = WeightFileReader(paths[0], direct=True)
    if not reader.is_direct:
        reader.close()
        pytest.skip("this file system keeps everything cached or has no O_DIRECT")
    buffer = torch.empty(len(data) + 4 * 4096, dtype=torch.uint8)
    skip = -buffer.data_ptr() % 4096
    view = memoryview(buffer.numpy())[skip:]
    for offset, count in ((0, 1), (5, 4096), (4095, 2), (len(data) - 3, 3), (0, len(data))):
        begin = reader.read_aligned(offset, count, view)
        assert bytes(view[begin : begin + count]) == data[offset : offset + count]
    reader.close()


def test_bytes_copied_from_memory_are_the_files_and_a_cut_file_is_an_error() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "a.safetensors"
        save_file({"w": torch.arange(10_000, dtype=torch.float32)}, path)
        data = path.read_bytes()
        reader = WeightFileReader(path, direct=True)
        view = memoryview(bytearray(len(data) + 4 * 4096))
        for offset, count in ((0, 1), (5, 4096), (4095, 2), (len(data) - 3, 3), (0, len(data))):
            begin = reader.read_aligned(offset, count, view)
            assert bytes(view[begin : begin + count]) == data[offset : offset + count]
        os.truncate(path, 5000)
        with pytest.raises(ModelError, match=r"a\.safetensors: ends at byte 5000"):
            reader.read_aligned(4000, 2000, view)
        assert str(path) in Path("/proc/self/maps").read_text()
        reader.close()
        wait_for(
            lambda: str(path) not in Path("/proc/self/maps").read_text(),
            timeout_s=20,
            what="the mapping to be gone",
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_on_the_device_are_those_in_the_file(
    paths: list[Path], tensors: dict[str, torch.Tensor], buffer_bytes: int
) -> None:
    parts = {"big": Slice(1, 3, 60), "half": Slice(0, 1, 4)}
    for slicer in (lambda name, shape: None, lambda name, shape: parts.get(name)):
        found = dict(load_weights(paths, device="cuda", slicer=slicer, buffer_bytes=buffer_bytes))
        torch.cuda.synchronize()
        for name, tensor in tensors.items():
            part = slicer(name, tuple(tensor.shape))
            expected = tensor.narrow(part[0], part[1], part[2] - part[1]) if part else tensor
            assert found[name].is_cuda
            assert_equal(found[name].cpu(), expected)


@pytest.mark.parametrize(
    ("num_cores", "num_ranks", "expected"),
    [(2, None, 4), (16, None, 16), (16, 2, 8), (208, 8, 16), (8, 8, 4), (64, None, 16)],
)
def test_readers_are_as_many_as_a_ranks_share_of_the_cores_is_worth(
    num_cores: int, num_ranks: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if num_ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_ranks))
    assert default_threads() == expected


def test_a_rank_reads_its_own_rows_from_the_disk_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(4096, 1024, dtype=torch.bfloat16)}, path)

    def bytes_read() -> int:
        fields = Path("/proc/self/io").read_text().split()
        return int(fields[fields.index("rchar:") + 1])

    before = bytes_read()
    rows = Slice(0, 1024, 2048)
    ((_, tensor),) = load_weights([path], method="parallel", slicer=lambda name, shape: rows)
    assert tensor.shape == (1024, 1024)
    assert tensor.nbytes <= bytes_read() - before < tensor.nbytes + 100_000
