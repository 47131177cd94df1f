import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.checksums import CRC64NVME, RANGE_ALGORITHMS, Checksum, file_checksum
from storage.errors import CorruptObject, InputChanged, StoreUnavailable
from storage.partial_file import RANGE_BYTES
from storage.ranged_copy import BUFFER_BYTES, RangedCopy
from storage.s3_client import RetryPolicy
from storage.stage_sources import SourceFile

FAST = RetryPolicy(max_attempts=4, base_s=0.001)
Fault = Callable[[bytes], bytes]


class ScriptedSource:
    """Files in memory, whose bodies a test can spoil, range by range."""

    uri = "memory://"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.opened: list[tuple[str, int, int]] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()

    def list_files(self) -> list[SourceFile]:
        return [self.describe_one(name) for name in self.files]

    def describe_one(self, name: str, algorithm: str = "crc64nvme") -> SourceFile:
        crc = RANGE_ALGORITHMS[algorithm]
        return SourceFile(
            name=name,
            size=len(self.files[name]),
            etag="e1",
            checksum=crc.encode(crc.update(self.files[name], 0)),
            promised_by="the store",
        )

    def describe(self, files: list[SourceFile]) -> list[SourceFile]:
        return files

    def read(self, file: SourceFile) -> bytes:
        return self.files[file.name]

    def open_range(self, file: SourceFile, start: int, end: int) -> "Body":
        with self._lock:
            self.opened.append((file.name, start, end))
            fault = self.faults.pop(0) if self.faults else bytes
        return Body(fault(self.files[file.name][start:end]))


class Body:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def readinto(self, view: memoryview, /) -> int:
        count = min(len(view), len(self._data), 100_000)
        view[:count] = self._data[:count]
        self._data = self._data[count:]
        return count

    def close(self) -> None:
        self._data = b""


def copy(
    source: ScriptedSource,
    folder: Path,
    *,
    files: list[SourceFile] | None = None,
    direct: bool = False,
    num_threads: int = 3,
) -> RangedCopy:
    copier = RangedCopy(source, folder, direct=direct, num_threads=num_threads, retry=FAST)
    try:
        copier.resume(files or source.list_files())
        copier.allocate()
        copier.run()
    finally:
        copier.close()
    return copier


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(1).randbytes(2 * RANGE_BYTES + 12_345)


@pytest.mark.parametrize("direct", [False, True])
def test_files_of_any_size_arrive_identical(tmp_path: Path, data: bytes, direct: bool) -> None:
    files = {
        "big.json": data,
        "empty.txt": b"",
        "one.txt": b"x",
        "sub/page.jinja": data[:4096],
        "buffer.txt": data[:BUFFER_BYTES],
    }
    copier = copy(ScriptedSource(files), tmp_path, direct=direct)
    for name, content in files.items():
        assert (tmp_path / name).read_bytes() == content
        assert copier.checksums[name] == file_checksum(tmp_path / name, "crc64nvme")
    assert copier.stats.bytes_moved == sum(map(len, files.values()))
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("algorithm", sorted(RANGE_ALGORITHMS))
def test_whatever_the_store_promises_by_range_is_compared(tmp_path: Path, algorithm: str) -> None:
    source = ScriptedSource({"a.json": b"some bytes"})
    file = source.describe_one("a.json", algorithm)
    copier = copy(source, tmp_path, files=[file])
    assert copier.checksums["a.json"].algorithm == algorithm
    source.files["a.json"] = b"other byte"
    with pytest.raises(CorruptObject, match=f"the store promises {algorithm}"):
        copy(source, tmp_path / "again", files=[file])


def test_ranges_combine_to_the_checksum_of_the_whole() -> None:
    whole = random.Random(2).randbytes(1000)
    for algorithm in RANGE_ALGORITHMS.values():
        cuts = [whole[:1], whole[1:600], whole[600:]]
        parts = [(algorithm.update(cut, 0), len(cut)) for cut in cuts]
        assert algorithm.whole(parts) == algorithm.encode(algorithm.update(whole, 0))


def test_a_body_that_breaks_off_is_taken_up_where_it_ended(tmp_path: Path, data: bytes) -> None:
    source = ScriptedSource({"a.json": data[:RANGE_BYTES]})
    source.faults = [lambda body: body[: BUFFER_BYTES + 5]]
    copier = copy(source, tmp_path)
    assert (tmp_path / "a.json").read_bytes() == data[:RANGE_BYTES]
    assert source.opened == [("a.json", 0, RANGE_BYTES), ("a.json", BUFFER_BYTES, RANGE_BYTES)]
    assert copier.stats.num_retries == 1


def _refuse(body: bytes) -> bytes:
    raise StoreUnavailable("503 SlowDown")


def test_a_store_that_stays_away_is_given_up_after_bounded_tries(tmp_path: Path) -> None:
    source = ScriptedSource({"a.json": b"x" * 100})
    source.faults = [_refuse] * 100
    with pytest.raises(StoreUnavailable, match="gave up after 4 attempts"):
        copy(source, tmp_path)
    assert len(source.opened) == 4
    assert not (tmp_path / "a.json").exists()


def test_a_source_that_was_replaced_ends_the_copy_at_once(tmp_path: Path, data: bytes) -> None:
    def replaced(body: bytes) -> bytes:
        raise InputChanged("412")

    source = ScriptedSource({"a.json": data})
    source.faults = [bytes, replaced]
    with pytest.raises(InputChanged):
        copy(source, tmp_path)
    assert not (tmp_path / "a.json").exists()


def test_one_flipped_bit_is_refused_and_the_next_copy_is_right(tmp_path: Path, data: bytes) -> None:
    def flip(body: bytes) -> bytes:
        return body[:77] + bytes([body[77] ^ 4]) + body[78:]

    source = ScriptedSource({"a.json": data})
    source.faults = [bytes, flip]
    with pytest.raises(CorruptObject, match=r"a\.json.*the copy has.*deleted"):
        copy(source, tmp_path)
    assert list(tmp_path.iterdir()) == []
    copy(source, tmp_path)
    assert (tmp_path / "a.json").read_bytes() == data


def _broken_off(source: ScriptedSource, folder: Path, num_ranges: int) -> None:
    """Copy so many ranges, then fail for good."""
    source.faults = [bytes] * num_ranges + [_refuse] * 20
    with pytest.raises(StoreUnavailable):
        copy(source, folder, num_threads=1)
    source.faults, source.opened = [], []


def test_a_later_copy_fetches_only_what_is_missing(tmp_path: Path, data: bytes) -> None:
    source = ScriptedSource({"a.json": data})
    _broken_off(source, tmp_path, 2)
    copier = copy(source, tmp_path)
    assert (tmp_path / "a.json").read_bytes() == data
    assert copier.stats.bytes_resumed == 2 * RANGE_BYTES
    assert [start for _, start, _ in source.opened] == [2 * RANGE_BYTES]


def test_bytes_damaged_on_disk_after_they_were_journaled_are_fetched_again(
    tmp_path: Path, data: bytes
) -> None:
    source = ScriptedSource({"a.json": data})
    _broken_off(source, tmp_path, 2)
    with (tmp_path / "a.json.partial").open("r+b") as partial:
        partial.seek(RANGE_BYTES + 5)
        partial.write(b"XX")
    copy(source, tmp_path)
    assert (tmp_path / "a.json").read_bytes() == data
    assert sorted(start for _, start, _ in source.opened) == [RANGE_BYTES, 2 * RANGE_BYTES]


@pytest.mark.parametrize("journal", ["", "garbage\n0 1\n", "[1]\n", "0 12"])
def test_a_journal_of_something_else_is_not_believed(
    tmp_path: Path, data: bytes, journal: str
) -> None:
    source = ScriptedSource({"a.json": data})
    _broken_off(source, tmp_path, 2)
    (tmp_path / "a.json.journal").write_text(journal)
    copier = copy(source, tmp_path)
    assert copier.stats.bytes_resumed == 0
    assert (tmp_path / "a.json").read_bytes() == data


def test_a_partial_of_an_older_object_is_not_mixed_with_the_new_one(
    tmp_path: Path, data: bytes
) -> None:
    _broken_off(ScriptedSource({"a.json": bytes(len(data))}), tmp_path, 2)
    source = ScriptedSource({"a.json": data})
    file = SourceFile(name="a.json", size=len(data), etag="e2")
    assert copy(source, tmp_path, files=[file]).stats.bytes_resumed == 0
    assert (tmp_path / "a.json").read_bytes() == data


def test_a_finished_file_of_an_unfinished_model_is_checked_again(
    tmp_path: Path, data: bytes
) -> None:
    source = ScriptedSource({"a.json": data})
    copy(source, tmp_path)
    with (tmp_path / "a.json").open("r+b") as file:
        file.write(b"X")
    source.opened = []
    copy(source, tmp_path)
    assert (tmp_path / "a.json").read_bytes() == data
    assert [start for _, start, _ in source.opened] == [0]


def test_a_recorded_sha256_is_compared_when_the_store_promises_nothing(tmp_path: Path) -> None:
    source = ScriptedSource({"a.json": b"bytes"})
    (tmp_path / "right").write_bytes(b"bytes")
    right = file_checksum(tmp_path / "right", "sha256")
    file = SourceFile(name="a.json", size=5, etag="e", checksum=right, promised_by="SHA256SUMS")
    copy(source, tmp_path, files=[file])
    source.files["a.json"] = b"bytez"
    with pytest.raises(CorruptObject, match="SHA256SUMS"):
        copy(source, tmp_path / "again", files=[file])


def test_an_unsound_weight_file_is_refused_even_when_nobody_promised_anything(
    tmp_path: Path,
) -> None:
    source = ScriptedSource({"m.safetensors": b"\xff" * 64})
    file = SourceFile(name="m.safetensors", size=64, etag="e")
    with pytest.raises(CorruptObject, match=r"m\.safetensors: header of"):
        copy(source, tmp_path, files=[file])
    assert list(tmp_path.iterdir()) == []


def test_checksums_are_those_of_the_store() -> None:
    # The check value of CRC-64/NVME, from the catalogue of CRC algorithms.
    assert CRC64NVME.update(b"123456789", 0) == 0xAE8B14860A799888
    assert str(Checksum.parse("crc32:AAAAAA==")) == "crc32:AAAAAA=="
    with pytest.raises(ValueError, match="not a checksum"):
        Checksum.parse("nothing")
