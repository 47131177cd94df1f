"""Weights to the GPU: what the bus, the memory and the disk can do, and what loading reaches of it.

    python -m tests.benchmarks.bench_load --gb 16 --disk /path/on/nvme --disk-gb 4
    python -m tests.benchmarks.bench_load --gb 2 --host-only

fastsafetensors and instanttensor are measured too where they are importable.

Measures pinned host-to-device copies (`bus`), then, from /dev/shm on small pages (`shm`), from /dev/shm on
huge pages, as staging reserves them where it can (`huge`), and from disk (its page cache dropped before): the
bare ways without a loader (`read`, `mapped`, `populated`, `registered`: see `bare_copies`; the ceiling of
ours), the library's loader, and ours (`parallel`), each for every number of threads and size of buffers;
`first` is in a process that has loaded nothing yet, its pinned memory made ready beforehand as an engine does,
and with `cold` not so. `small` are files of many small tensors. `disk` is O_DIRECT reads without a GPU. The
last two take the defaults and the last of the given numbers only: there, buffers are not what decides.
`--host-only` needs no GPU: /dev/shm into warm ordinary memory, and ours on the CPU. The last line is JSON.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from inference.load_weights import default_threads, load_weights
from inference.pinned_memory import make_ready
from inference.weight_movers import BUFFER_BYTES
from storage.huge_pages import HugePages
from tests.benchmarks.bare_copies import DEVICE_WAYS, HOST_WAYS, into_memory, to_device

HIDDEN, INTERMEDIATE = 4096, 12_288  # an 8B model's biggest matrices
NUM_FILES = 4
_TOKENIZER_S = 0.5  # less than what an engine does between the two
_BEGAN = time.perf_counter()
PLACES = ("shm", "huge", "small", "disk")
BARS = {"shm": 0.7, "huge": 0.7, "disk": 0.9}
"""Shares of the bus, and of the disk."""


def main() -> None:
    args = _arguments()
    if args.host_only:
        _print_host(args)
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: measure the host alone with --host-only")
    if args.first:
        way, *names = args.first
        print(_first_load([Path(name) for name in names], way))
        return
    found: dict[str, float] = {"bus": _bus_gb_per_s()}
    for place in filter(args.places.__contains__, ("shm", "huge")):
        with _models(args.gb, "/dev/shm", is_huge=place == "huge") as paths:
            if not args.no_bare:
                found |= _bare(place, paths, args)
            found |= _loaders(place, paths, args, _variants(args))
            peers = ["safetensors", *(peer for peer in PEERS if find_spec(peer))]
            ours = [f"{threads}x{mib}" for threads, mib in _few_variants(args)]
            for way in [*peers, *ours, *(f"{way}cold" for way in ours)]:
                name = f"{place}_first_{way}"
                work = partial(_first_in_new_process, paths, way)
                found[name] = _median(name, args.rounds, work)
    if "small" in args.places:
        with _models(args.gb / 4, "/dev/shm", shapes=SMALL) as paths:
            found |= _loaders("small", paths, args, _few_variants(args))
    if "disk" in args.places:
        with _models(args.disk_gb or args.gb, args.disk) as paths:
            drop = partial(_drop_cache, paths)
            found["disk"] = _median("disk", args.rounds, partial(_read_only, paths), drop)
            found |= _loaders("disk", paths, args, _few_variants(args), before=drop)
    _print(args, found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4.0, help="bytes of weights, in GB")
    parser.add_argument(
        "--disk", default=tempfile.gettempdir(), help="folder on the disk to measure"
    )
    parser.add_argument("--disk-gb", type=float, help="of weights there; default: as many")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--no-bare", action="store_true", help="loaders only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="*", default=[4, 8, 12, 16])
    parser.add_argument("--buffers-mib", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--host-only", action="store_true", help="measure without a GPU")
    parser.add_argument("--first", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def _variants(args: argparse.Namespace) -> list[tuple[int, int]]:
    return [(threads, buffer) for threads in args.threads for buffer in args.buffers_mib]


def _few_variants(args: argparse.Namespace) -> list[tuple[int, int]]:
    """The loader's defaults, and the last of those asked for."""
    return sorted({(default_threads(), BUFFER_BYTES >> 20), _variants(args)[-1]})


Shapes = list[tuple[str, list[int]]]
BIG: Shapes = [("norm", [HIDDEN]), ("proj", [INTERMEDIATE, HIDDEN])]
SMALL: Shapes = [("norm", [HIDDEN]), ("bias", [768]), ("expert", [768, 1024])]


@contextmanager
def _models(
    num_gb: float, parent: str, shapes: Shapes = BIG, *, is_huge: bool = False
) -> Iterator[list[Path]]:
    """Sound safetensors files of bf16 tensors, deleted afterwards."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        share = num_gb / NUM_FILES
        yield [
            _write_file(folder, index, share, shapes, is_huge=is_huge) for index in range(NUM_FILES)
        ]
    finally:
        shutil.rmtree(folder)


def _write_file(
    folder: Path, index: int, num_gb: float, shapes: Shapes, *, is_huge: bool = False
) -> Path:
    group_bytes = sum(2 * math.prod(shape) for _, shape in shapes)
    header: dict[str, object] = {}
    end = 0
    for number in range(max(1, round(num_gb * 1e9 / group_bytes))):
        for name, shape in shapes:
            start, end = end, end + 2 * math.prod(shape)
            header[f"layers.{index}.{number}.{name}.weight"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [start, end],
            }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / f"model-{index + 1:05d}-of-{NUM_FILES:05d}.safetensors"
    block = os.urandom(16 << 20)
    with path.open("w+b") as file:
        if is_huge:
            size = 8 + len(text) + end
            reserved = HugePages(most_s_per_byte=math.inf).reserve(file.fileno(), size)
            if reserved < end // 2:
                print(f"only {reserved} of {size} bytes are on huge pages", file=sys.stderr)
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
    place: str,
    paths: list[Path],
    args: argparse.Namespace,
    variants: list[tuple[int, int]],
    before: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """GB/s of every loader; with `kept` tensors as an engine has them: allocated once before."""
    kept = {name: torch.empty_like(tensor) for name, tensor in load_weights(paths, device="cuda")}
    plain = partial(_load, paths, kept, "safetensors", 1, 32)
    ways: dict[str, Callable[[], float]] = {f"{place}_safetensors": plain}
    for peer, load in PEERS.items():
        if find_spec(peer):
            ways[f"{place}_{peer}"] = partial(_timed, partial(load, paths, kept), kept)
    for num_threads, buffer_mib in variants:
        ways[f"{place}_parallel_{num_threads}x{buffer_mib}"] = partial(
            _load, paths, kept, "parallel", num_threads, buffer_mib
        )
    return {name: _median(name, args.rounds, work, before) for name, work in ways.items()}


def _load(
    paths: list[Path],
    kept: dict[str, torch.Tensor],
    method: str,
    num_threads: int,
    buffer_mib: int,
    device: str = "cuda",
) -> float:
    def work() -> None:
        for _name, _tensor in load_weights(
            paths,
            device=device,
            method=method,  # type: ignore[arg-type]
            destination=lambda name, shape, dtype: kept[name],
            num_threads=num_threads,
            buffer_bytes=buffer_mib << 20,
        ):
            pass

    return _timed(work, kept)


def _bare(place: str, paths: list[Path], args: argparse.Namespace) -> dict[str, float]:
    """GB/s of every way without a loader."""
    rows = {}
    for num_threads, buffer_mib in _variants(args):
        for way in DEVICE_WAYS:
            name = f"{place}_{way}_{num_threads}x{buffer_mib}"
            work = partial(to_device, paths, way, num_threads, buffer_mib)
            rows[name] = _median(name, args.rounds, work)
    return rows


def _first_load(paths: list[Path], way: str) -> float:
    """GB/s of the first load of a process by a library, or by ours with so many threads and MiB.

    `16x32` has its pinned memory made ready beforehand, `16x32cold` does not.
    """
    is_expected, way = not way.endswith("cold"), way.removesuffix("cold")
    torch.zeros(1, device="cuda")
    kept: dict[str, torch.Tensor] = {}
    if way in PEERS:
        import_module(way)
        work = partial(PEERS[way], paths, kept)
    elif way == "safetensors":
        work = partial(kept.update, load_weights(paths, device="cuda", method="safetensors"))
    else:
        threads, mib = map(int, way.split("x"))
        if is_expected:  # as an engine does, before it reads the tokenizer
            device = torch.device("cuda", 0)
            make_ready(2 * threads, mib << 20, device, num_threads=threads)
            time.sleep(_TOKENIZER_S)
        loading = load_weights(
            paths,
            device="cuda",
            method="parallel",
            num_threads=threads,
            buffer_bytes=mib << 20,
        )
        work = partial(kept.update, loading)
    return _timed(work, kept)


def _first_in_new_process(paths: list[Path], way: str) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.bench_load", "--first", way]
    ran = subprocess.run(
        [*command, *map(str, paths)], check=True, stdout=subprocess.PIPE, text=True
    )
    return float(ran.stdout.split()[-1])


def _fastsafetensors(paths: list[Path], kept: dict[str, torch.Tensor]) -> None:
    from fastsafetensors import SingleGroup, fastsafe_open  # type: ignore[import-not-found]

    names = [str(path) for path in paths]
    with fastsafe_open(names, pg=SingleGroup(), device="cuda:0", nogds=True) as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            kept[name] = kept[name].copy_(tensor) if name in kept else tensor


def _instanttensor(paths: list[Path], kept: dict[str, torch.Tensor]) -> None:
    from instanttensor import safe_open  # type: ignore[import-not-found]

    with safe_open([str(path) for path in paths], framework="pt", device=0) as file:
        for name, tensor in file.tensors():
            kept[name] = kept[name].copy_(tensor) if name in kept else tensor


PEERS = {"fastsafetensors": _fastsafetensors, "instanttensor": _instanttensor}


def _timed(work: Callable[[], None], kept: dict[str, torch.Tensor]) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
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


def _median(
    name: str, rounds: int, measure: Callable[[], float], before: Callable[[], None] = lambda: None
) -> float:
    """Measure some rounds; tell each, for a run may be stopped."""
    speeds = []
    for _ in range(rounds):
        before()
        speeds.append(measure())
    elapsed_s = time.perf_counter() - _BEGAN
    told = " ".join(f"{speed:.2f}" for speed in speeds)
    print(f"[{elapsed_s:4.0f} s] {name}: {told} GB/s", file=sys.stderr, flush=True)
    return statistics.median(speeds)


def _print_host(args: argparse.Namespace) -> None:
    """/dev/shm to ordinary memory that is warm: what the host's share of loading costs."""
    print(f"{args.gb} GB in {NUM_FILES} files from /dev/shm, {os.cpu_count()} cores, no GPU\n")
    print("| pages | way | threads | buffers MiB | GB/s | CPU s/GB |")
    print("|---|---|---|---|---|---|")
    rows: list[list[object]] = []
    for pages in ("small", "huge"):
        with _models(args.gb, "/dev/shm", is_huge=pages == "huge") as paths:
            for row in _host_rows(paths, args):
                rows.append([pages, *row])
                print("| " + " | ".join(map(str, rows[-1])) + " |", flush=True)
    print(json.dumps({"bench": "load-host", "gb": args.gb, "rows": rows}))


def _host_rows(paths: list[Path], args: argparse.Namespace) -> Iterator[list[object]]:
    """Yield way, threads, buffers, GB/s and CPU seconds a GB."""
    kept = dict(load_weights(paths, method="parallel"))
    num_gb = sum(tensor.nbytes for tensor in kept.values()) / 1e9
    ways: dict[str, Callable[[int, int], float]] = {
        way: partial(into_memory, paths, way) for way in HOST_WAYS
    }
    ways["ours, into tensors"] = lambda threads, mib: _load(
        paths, kept, "parallel", threads, mib, "cpu"
    )
    for num_threads, buffer_mib in _variants(args):
        for way, measure in ways.items():
            costs: list[float] = []
            work = partial(_with_cpu, measure, costs, num_threads, buffer_mib)
            speed = _median(way, args.rounds, work)
            cost = statistics.median(costs) / num_gb
            yield [way, num_threads, buffer_mib, round(speed, 2), round(cost, 3)]


def _with_cpu(
    measure: Callable[[int, int], float], costs: list[float], threads: int, mib: int
) -> float:
    before = time.process_time()
    speed = measure(threads, mib)
    costs.append(time.process_time() - before)
    return speed


def _print(args: argparse.Namespace, found: dict[str, float]) -> None:
    print(
        f"{args.gb} GB in {NUM_FILES} files to {torch.cuda.get_device_name()}; median of {args.rounds}\n"
    )
    print("| path | GB/s | share of its yardstick |")
    print("|---|---|---|")
    for name, speed in found.items():
        base = found["disk"] if name.startswith("disk") else found["bus"]
        print(f"| {name} | {speed:.2f} | {speed / base:.2f} |")
    shares = {}
    for place in filter(args.places.__contains__, BARS):
        # A disk faster than the bus is not the limit.
        limit = min(found["bus"], found["disk"]) if place == "disk" else found["bus"]
        shares[place] = _best(found, f"{place}_parallel") / limit
    print(
        json.dumps(
            {
                "bench": "load",
                "gb": args.gb,
                "gb_per_s": {name: round(speed, 2) for name, speed in found.items()},
                "shares": {place: round(share, 3) for place, share in shares.items()},
                "meets": {place: share >= BARS[place] for place, share in shares.items()},
            }
        )
    )


def _best(found: dict[str, float], prefix: str) -> float:
    return max(speed for name, speed in found.items() if name.startswith(prefix))


if __name__ == "__main__":
    main()
