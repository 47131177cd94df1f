"""Real processes, a real S3 server, and a proxy that spoils what passes: nothing damaged is ever whole."""

import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from storage import model_caches
from storage.errors import BadInput, CorruptObject, InputChanged, NoSpace, StoreUnavailable
from storage.object_store import StorageConfig
from storage.s3_client import RetryPolicy, make_client
from storage.staging import StagedModel, stage_model
from tests.faults.fault_proxy import FOREVER, FaultProxy, Kind
from tests.model_files import folder_bytes, write_model
from tests.pipeline import CASES, Nightjar, expected
from tests.seaweed import Seaweed, put_model

MIB = 1 << 20
FAST = RetryPolicy(max_attempts=6, base_s=0.01)
NUM_RANGES = 2 * 2  # two weight files of two ranges each


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder, num_weight_files=2, weight_bytes=20 * MIB)


@pytest.fixture
def source(seaweed: Seaweed, model: Path) -> str:
    """The model in a bucket of its own, with the checksums that the store verified."""
    return put_model(seaweed, model)


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.port) as proxy:
        yield proxy


@pytest.fixture
def cache() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def stage(proxy: FaultProxy, source: str, cache: Path, **options: Any) -> StagedModel:
    config = StorageConfig(endpoint_url=proxy.endpoint_url, region="us-east-1")
    options = {"retry": FAST} | options
    return stage_model(source, config=config, stage_to=str(cache), **options)


def is_whole(cache: Path) -> bool:
    return bool(list(cache.rglob("MANIFEST.json")))


PROGRAM = """
import sys
from storage.object_store import StorageConfig
from storage.s3_client import RetryPolicy
from storage.staging import stage_model
source, endpoint, cache = sys.argv[1:]
config = StorageConfig(endpoint_url=endpoint, region="us-east-1")
retry = RetryPolicy(stall_s=1.0)
with stage_model(source, config=config, stage_to=cache, num_threads=2, retry=retry) as staged:
    print(staged.report.outcome, staged.path)
"""


def start(proxy: FaultProxy, source: str, cache: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, source, proxy.endpoint_url, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_model_on_s3_is_staged_and_checked_against_the_store(
    proxy: FaultProxy, source: str, cache: Path, model: Path
) -> None:
    with stage(proxy, source, cache) as staged:
        assert folder_bytes(staged.path) == folder_bytes(model)
        assert staged.report.verified_by == {"the store": 6}
        assert staged.report.gb_per_s > 0
    assert proxy.count(r"^GET .*-of-00002\.safetensors") == NUM_RANGES
    before = len(proxy.requests)
    with stage(proxy, source, cache) as again:
        assert again.report.outcome == "hit"
    assert len(proxy.requests) == before + 1, "the second stage is one listing"


@pytest.mark.timing
def test_the_second_stage_takes_less_than_a_fifth_of_a_second(
    proxy: FaultProxy, source: str, cache: Path
) -> None:
    stage(proxy, source, cache).close()
    with stage(proxy, source, cache) as again:
        assert again.report.outcome == "hit"
        assert again.report.seconds < 0.2


def test_killed_at_random_moments_it_finishes_identical(
    proxy: FaultProxy, source: str, cache: Path, model: Path
) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    num_killed = 0
    for _ in range(5):
        process = start(proxy, source, cache)
        seen = len(proxy.requests)
        target = seen + rng.randint(1, 9)
        while len(proxy.requests) < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        num_killed += process.poll() is None
        process.kill()
        process.communicate()
    assert num_killed, "no process was killed before it was done"
    process = start(proxy, source, cache)
    outcome, path = process.communicate(timeout=60)[0].split()
    assert outcome in ("staged", "hit")
    assert folder_bytes(Path(path)) == folder_bytes(model)
    assert sorted(p.name for p in cache.rglob("*") if p.suffix in (".partial", ".journal")) == []


def test_four_processes_at_once_move_the_bytes_once(
    proxy: FaultProxy, source: str, cache: Path, model: Path
) -> None:
    processes = [start(proxy, source, cache) for _ in range(4)]
    outcomes, paths = zip(
        *(process.communicate(timeout=100)[0].split() for process in processes), strict=True
    )
    assert sorted(outcomes) == ["hit", "hit", "hit", "staged"]
    assert len(set(paths)) == 1
    assert folder_bytes(Path(paths[0])) == folder_bytes(model)
    assert proxy.count(r"^GET .*-of-00002\.safetensors") == NUM_RANGES
    assert proxy.count(r"^GET .*config\.json") == 1


@pytest.mark.parametrize("is_killed", [False, True])
def test_who_waits_for_another_process_is_told_of_each_file_that_it_has_verified(
    proxy: FaultProxy, source: str, cache: Path, model: Path, is_killed: bool
) -> None:
    rule = proxy.add("stall", r"^GET .*00002-of", count=FOREVER, kept=0.0, seconds=600)
    first, told = start(proxy, source, cache), SimpleQueue[Path]()
    while not proxy.injected["stall"]:
        time.sleep(0.01)
    with ThreadPoolExecutor(1) as pool:
        options = {"on_ready": told.put, "on_file": told.put}
        second = pool.submit(stage, proxy, source, cache, **options)
        folder, files = told.get(timeout=60), {told.get(timeout=60).name for _ in range(5)}
        assert folder.parent.parent == cache
        weights = "model-00001-of-00002.safetensors"
        assert weights in files
        assert (folder / weights).read_bytes() == (model / weights).read_bytes()
        assert not is_whole(cache)
        rule.count = 0
        if is_killed:
            first.kill()
        while not second.done():
            assert (folder / weights).exists(), "an engine may be reading it"
            time.sleep(0.0005)
        with second.result() as staged:
            assert staged.report.outcome == ("staged" if is_killed else "hit")
            assert folder_bytes(staged.path) == folder_bytes(model)
    first.kill()
    first.communicate()


def test_truncations_refusals_and_drops_are_outlived(
    proxy: FaultProxy, source: str, cache: Path, model: Path
) -> None:
    for kind, count in (("truncate", 3), ("status", 2), ("drop_before", 2), ("drop_after", 1)):
        proxy.add(kind, r"^(GET|HEAD) .*models/m/", count=count)  # type: ignore[arg-type]
    with stage(proxy, source, cache) as staged:
        assert folder_bytes(staged.path) == folder_bytes(model)
        assert staged.report.verified_by == {"the store": 6}
    assert proxy.pending() == 0


def test_a_body_that_stalls_is_asked_for_again(
    proxy: FaultProxy, source: str, cache: Path, model: Path
) -> None:
    proxy.add("stall", r"^GET .*00001-of", seconds=0.5)
    with stage(proxy, source, cache) as staged:
        assert folder_bytes(staged.path) == folder_bytes(model)
        assert staged.report.num_retries == 1


@pytest.mark.parametrize("kind", ["stall", "trickle"])
def test_a_body_that_stalls_or_trickles_without_an_end_is_cut_off_and_asked_for_again(
    proxy: FaultProxy, source: str, cache: Path, model: Path, kind: Kind
) -> None:
    for name in ("config.json", "00001-of"):
        proxy.add(kind, f"^GET .*{name}", seconds=600)
    began = time.monotonic()
    with stage(proxy, source, cache, retry=replace(FAST, stall_s=1.5)) as staged:
        assert folder_bytes(staged.path) == folder_bytes(model)
        assert staged.report.num_retries >= 2
    assert proxy.injected[kind] == 2
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("kind", ["stall", "trickle"])
def test_a_store_that_only_stalls_is_given_up_in_bounded_time(
    proxy: FaultProxy, source: str, cache: Path, kind: Kind
) -> None:
    proxy.add(kind, r"^GET .*-of-00002", seconds=600, count=FOREVER, kept=0.0)
    retry = replace(FAST, max_attempts=1000, stall_s=1.0, patience_s=3.0)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"-of-00002.*s without progress"):
        stage(proxy, source, cache, retry=retry)
    assert time.monotonic() - began < 60
    assert not is_whole(cache)


def test_a_store_that_stays_down_is_given_up_and_resumed_later(
    proxy: FaultProxy, source: str, cache: Path, model: Path
) -> None:
    rule = proxy.add("status", r"^GET .*00002-of", count=1000)
    with pytest.raises(StoreUnavailable, match="gave up after 6 attempts"):
        stage(proxy, source, cache, num_threads=1)
    assert not is_whole(cache)
    rule.count = 0
    with stage(proxy, source, cache) as staged:
        assert staged.report.bytes_resumed > 20 * MIB, "the first file was there already"
        assert folder_bytes(staged.path) == folder_bytes(model)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json"])
def test_one_flipped_bit_is_refused_with_nothing_published(
    proxy: FaultProxy, source: str, cache: Path, model: Path, name: str
) -> None:
    proxy.add("flip", rf"^GET .*{name}")
    with pytest.raises(CorruptObject, match=rf"{name}: the store promises crc64nvme"):
        stage(proxy, source, cache)
    assert not is_whole(cache)
    with stage(proxy, source, cache) as staged:
        assert folder_bytes(staged.path) == folder_bytes(model)


def test_a_sha256_that_the_store_keeps_of_the_whole_object_is_compared(
    seaweed: Seaweed, proxy: FaultProxy, cache: Path, tmp_path: Path
) -> None:
    write_model(tmp_path, num_weight_files=1)
    client = make_client(seaweed.config)
    for path in tmp_path.iterdir():
        client.put_object(
            Bucket=seaweed.bucket,
            Key=f"sha/{path.name}",
            Body=path.read_bytes(),
            ChecksumAlgorithm="SHA256",
        )
    client.close()
    rule = proxy.add("flip", r"^GET .*tokenizer\.json")
    with pytest.raises(CorruptObject, match="SHA-256 is not the one in the store"):
        stage(proxy, f"{seaweed.uri}/sha", cache)
    assert rule.count == 0
    with stage(proxy, f"{seaweed.uri}/sha", cache) as staged:
        assert staged.report.verified_by == {"the store": 5}


def test_an_object_replaced_midway_ends_in_a_clean_error(
    proxy: FaultProxy, seaweed: Seaweed, source: str, cache: Path, model: Path
) -> None:
    client = make_client(seaweed.config)
    name = "model-00002-of-00002.safetensors"
    other = bytearray((model / name).read_bytes())
    other[-1] ^= 1

    def replace_once(path: Path) -> None:
        if path.name == "tokenizer.json":
            client.put_object(Bucket=seaweed.bucket, Key=f"models/m/{name}", Body=bytes(other))

    with pytest.raises(InputChanged, match=r"00002-of-00002.*stage it again"):
        stage(proxy, source, cache, on_file=replace_once)
    assert not is_whole(cache)
    with stage(proxy, source, cache) as staged:
        assert folder_bytes(staged.path) == {**folder_bytes(model), name: bytes(other)}
    client.close()


def test_a_partial_damaged_after_it_was_journaled_is_not_believed(
    proxy: FaultProxy, source: str, cache: Path, model: Path
) -> None:
    rule = proxy.add("status", r"^GET .*00002-of", count=1000)
    with pytest.raises(StoreUnavailable):
        stage(proxy, source, cache, num_threads=1)
    (first,) = cache.rglob("model-00001-of-00002.safetensors")
    with first.open("r+b") as file:
        file.seek(17 * MIB)
        file.write(b"XX")
    rule.count = 0
    with stage(proxy, source, cache) as staged:
        assert folder_bytes(staged.path) == folder_bytes(model)


def test_a_file_missing_from_the_store_is_named_before_weights_move(
    proxy: FaultProxy, seaweed: Seaweed, source: str, cache: Path
) -> None:
    client = make_client(seaweed.config)
    name = "model-00001-of-00002.safetensors"
    client.delete_object(Bucket=seaweed.bucket, Key=f"models/m/{name}")
    client.close()
    with pytest.raises(BadInput, match=rf"index\.json names {name}"):
        stage(proxy, source, cache)
    assert proxy.count(r"^GET .*-of-00002\.safetensors") == 0


def test_a_store_without_checksums_gives_an_unverified_model_and_says_so(
    seaweed: Seaweed, cache: Path, tmp_path: Path
) -> None:
    write_model(tmp_path, num_weight_files=1)
    client = make_client(seaweed.config)
    for path in tmp_path.iterdir():
        client.put_object(Bucket=seaweed.bucket, Key=f"plain/{path.name}", Body=path.read_bytes())
    with stage_model(f"{seaweed.uri}/plain", config=seaweed.config, stage_to=str(cache)) as staged:
        assert sum(staged.report.verified_by.values()) == staged.report.num_files
        assert staged.report.verified_by.get("", 0) == len(staged.manifest.unverified)
    client.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 96 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "small"
    folder.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k,mode=700", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=False, capture_output=True)


def test_a_full_staging_disk_is_said_and_the_next_try_starts_clean(
    small_disk: Path, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", num_weight_files=2, weight_bytes=60_000)
    with pytest.raises(NoSpace, match=rf"{small_disk}.*: \d+ bytes needed, \d+ free; make room"):
        stage_model(str(model), config=StorageConfig(), stage_to=str(small_disk))
    assert list(small_disk.rglob("*.safetensors*")) == []
    assert not is_whole(small_disk)
    subprocess.run(["umount", str(small_disk)], check=True)
    with stage_model(str(model), config=StorageConfig(), stage_to=str(small_disk)) as staged:
        assert folder_bytes(staged.path) == folder_bytes(model)


def test_a_run_whose_staging_disk_is_full_ends_in_one_line_and_the_next_one_answers(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nightjar, case = Nightjar(tmp_path, capsys), "I10-staging-folder-full"
    (small_disk / "full").write_bytes(bytes(80 << 10))
    settings = {"hardware__stage_to": str(small_disk)}
    done = nightjar.run("chain-a", CASES / case / "input.parquet", **settings)
    assert done.code == 2
    assert re.search(rf"{small_disk}.*: \d+ bytes needed, \d+ free; make room", done.err)
    assert not is_whole(small_disk)
    assert not list(tmp_path.glob("out/*/completions/*"))
    (small_disk / "full").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    done = nightjar.run("chain-a", CASES / case / "input.parquet", **settings)
    assert done.code == 0, done.err
    assert is_whole(small_disk)
    answers = {row_id: row["completion"].strip() for row_id, row in done.by_id().items()}
    assert answers == expected(case)["run_2"]


READER = """
import sys
from storage.object_store import StorageConfig
from storage.staging import stage_model
source, endpoint, cache = sys.argv[1:]
config = StorageConfig(endpoint_url=endpoint, region="us-east-1")
with stage_model(source, config=config, stage_to=cache) as staged:
    print(staged.path, flush=True)
    sys.stdin.read()
"""


def test_a_model_is_not_evicted_under_a_reader_and_is_once_the_reader_was_killed(
    proxy: FaultProxy, source: str, cache: Path, model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", READER, source, proxy.endpoint_url, str(cache)]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert reader.stdout is not None
        path = Path(reader.stdout.readline().strip())
        (kept,) = model_caches.evict(source, roots=[cache])
        assert kept.kept_because == "a process is using it"
        other = write_model(tmp_path / "other", num_weight_files=1, weight_bytes=20 * MIB)
        with pytest.raises(NoSpace, match="pinned or in use"):
            stage_model(
                str(other), config=StorageConfig(), stage_to=str(cache), budget_bytes=45 * MIB
            )
        assert folder_bytes(path) == folder_bytes(model), "the reader's files were touched"
    finally:
        reader.kill()
        reader.communicate()
    with stage_model(
        str(other), config=StorageConfig(), stage_to=str(cache), budget_bytes=45 * MIB
    ) as staged:
        assert len(staged.report.evicted) == 1
    assert not path.exists()


def test_a_disk_that_fits_only_by_evicting_makes_room(small_disk: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = write_model(tmp_path / name, num_weight_files=1, weight_bytes=40_000)
        (model / "name.txt").write_text(name)
        with stage_model(str(model), config=StorageConfig(), stage_to=str(small_disk)) as staged:
            assert folder_bytes(staged.path) == folder_bytes(model)
    assert len(staged.report.evicted) == 1
    assert len(list(small_disk.rglob("MANIFEST.json"))) == 1
