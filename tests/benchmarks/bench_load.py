"""Weights to the GPU: what the bus, the memory and the disk can do, and what loading reaches of it.

    python -m tests.benchmarks.bench_load --gb 16 --disk /path/on/nvme

fastsafetensors and instanttensor are measured too where they are importable.

Measures pinned host-to-device copies, then loads the same safetensors files from /dev/shm and from disk
(its page cache dropped before) with the library's loader and with ours. `bus` and `disk` are the
yardsticks: copies of one pinned buffer, and O_DIRECT reads without a GPU. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from inference.load_weights import load_weights
from inference.weight_reader import BUFFER_BYTES

HIDDEN, INTERMEDIATE = 4096, 12_288  # an 8B model's biggest matrices
NUM_FILES = 4
BARS = {"shm_vs_bus": 0.7, "disk_vs_disk": 0.9}


def main() -> None:
    args = _arguments()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this benchmark measures copies to one")
    found: dict[str, float] = {"bus": _bus_gb_per_s()}
    with _models(args.gb, "/dev/shm") as paths:
        found |= _loaders("shm", paths, args, before=lambda: None)
    with _models(args.gb, args.disk) as paths:
        found["disk"] = _median(args.rounds, lambda: _read_only(paths), lambda: _drop_cache(paths))
        found |= _loaders("disk", paths, args, before=lambda: _drop_cache(paths))
    _print(args, found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4.0, help="bytes of weights, in GB")
    parser.add_argument(
        "--disk", default=tempfile.gettempdir(), help="folder on the disk to measure"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="*", default=[4, 8, 16])
    return parser.parse_args()


@contextmanager
def _models(num_gb: float, parent: str) -> Iterator[list[Path]]:
    """Sound safetensors files of bf16 matrices, deleted afterwards."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield [_write_file(folder, index, num_gb / NUM_FILES) for index in range(NUM_FILES)]
    finally:
        shutil.rmtree(folder)


def _write_file(folder: Path, index: int, num_gb: float) -> Path:
    matrix_bytes = HIDDEN * INTERMEDIATE * 2
    header: dict[str, object] = {}
    end = 0
    for number in range(max(1, round(num_gb * 1e9 / matrix_bytes))):
        for name, shape in (("norm", [HIDDEN]), ("proj", [INTERMEDIATE, HIDDEN])):
            start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[f"layers.{index}.{number}.{name}.weight"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [start, end],
            }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / f"model-{index + 1:05d}-of-{NUM_FILES:05d}.safetensors"
    block = os.urandom(16 << 20)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, len(block)):
            file.write(block[: min(len(block), end - start)])
        file.flush()
        os.fsync(file.fileno())
    return path


def _bus_gb_per_s() -> float:
    """Copies of one pinned buffer, large enough to hide every start."""
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    speeds = []
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        speeds.append(host.nbytes / (time.perf_counter() - began) / 1e9)
    return statistics.median(speeds)


def _loaders(
    place: str, paths: list[Path], args: argparse.Namespace, *, before: Callable[[], None]
) -> dict[str, float]:
    """GB/s of every loader; with `kept` tensors as an engine has them: allocated once before."""
    kept = {name: torch.empty_like(tensor) for name, tensor in load_weights(paths, device="cuda")}
    rows = {
        f"{place}_safetensors": _median(
            args.rounds, lambda: _load(paths, kept, "safetensors", 1), before
        )
    }
    for peer, load in PEERS.items():
        if find_spec(peer):
            rows[f"{place}_{peer}"] = _median(
                args.rounds,
                lambda load=load: _timed(lambda: load(paths, kept), kept),  # type: ignore[misc]
                before,
            )
    for num_threads in args.threads:
        rows[f"{place}_parallel_{num_threads}"] = _median(
            args.rounds,
            lambda num_threads=num_threads: _load(paths, kept, "parallel", num_threads),  # type: ignore[misc]
            before,
        )
    return rows


def _load(paths: list[Path], kept: dict[str, torch.Tensor], method: str, num_threads: int) -> float:
    def work() -> None:
        for _name, _tensor in load_weights(
            paths,
            device="cuda",
            method=method,  # type: ignore[arg-type]
            destination=lambda name, shape, dtype: kept[name],
            num_threads=num_threads,
        ):
            pass

    return _timed(work, kept)


def _fastsafetensors(paths: list[Path], kept: dict[str, torch.Tensor]) -> None:
    from fastsafetensors import SingleGroup, fastsafe_open  # type: ignore[import-not-found]

    names = [str(path) for path in paths]
    with fastsafe_open(names, pg=SingleGroup(), device="cuda:0", nogds=True) as file:
        for name in file.keys():  # noqa: SIM118
            kept[name].copy_(file.get_tensor(name))


def _instanttensor(paths: list[Path], kept: dict[str, torch.Tensor]) -> None:
    from instanttensor import safe_open  # type: ignore[import-not-found]

    names = [str(path) for path in paths]
    with safe_open(names, framework="pt", device=0, copy=False) as file:
        for name, tensor in file.tensors():
            kept[name].copy_(tensor)


PEERS = {"fastsafetensors": _fastsafetensors, "instanttensor": _instanttensor}


def _timed(work: Callable[[], None], kept: dict[str, torch.Tensor]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return sum(tensor.nbytes for tensor in kept.values()) / (time.perf_counter() - began) / 1e9


def _read_only(paths: list[Path]) -> float:
    """GB/s of O_DIRECT reads into pinned buffers, with nothing behind them."""
    num_threads = 8
    buffers = [
        torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(num_threads)
    ]
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    jobs = [
        (fd, offset)
        for fd, path in zip(fds, paths, strict=True)
        for offset in range(0, path.stat().st_size, BUFFER_BYTES)
    ]

    def read(lane: int) -> int:
        view = buffers[lane].numpy().data
        return sum(os.preadv(fd, [view], offset) for fd, offset in jobs[lane::num_threads])

    with ThreadPoolExecutor(num_threads) as pool:
        began = time.perf_counter()
        total = sum(pool.map(read, range(num_threads)))
        seconds = time.perf_counter() - began
    for fd in fds:
        os.close(fd)
    return total / seconds / 1e9


def _drop_cache(paths: list[Path]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _median(rounds: int, measure: Callable[[], float], before: Callable[[], None]) -> float:
    speeds = []
    for _ in range(rounds):
        before()
        speeds.append(measure())
    return statistics.median(speeds)


def _print(args: argparse.Namespace, found: dict[str, float]) -> None:
    print(
        f"{args.gb} GB in {NUM_FILES} files to {torch.cuda.get_device_name()}; median of {args.rounds}\n"
    )
    print("| path | GB/s | share of its yardstick |")
    print("|---|---|---|")
    for name, speed in found.items():
        base = found["bus"] if name.startswith(("shm", "bus")) else found["disk"]
        print(f"| {name} | {speed:.2f} | {speed / base:.2f} |")
    shares = {
        "shm_vs_bus": _best(found, "shm_parallel") / found["bus"],
        # A disk faster than the bus is not the limit.
        "disk_vs_disk": _best(found, "disk_parallel") / min(found["disk"], found["bus"]),
    }
    print(
        json.dumps(
            {
                "bench": "load",
                "gb": args.gb,
                "gb_per_s": {name: round(speed, 2) for name, speed in found.items()},
                **{name: round(share, 3) for name, share in shares.items()},
                "meets": {name: shares[name] >= bar for name, bar in BARS.items()},
            }
        )
    )


def _best(found: dict[str, float], prefix: str) -> float:
    return max(speed for name, speed in found.items() if name.startswith(prefix))


if __name__ == "__main__":
    main()
