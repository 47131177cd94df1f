"""Files in memory on huge pages: the same files, whatever the system makes of the wish."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import huge_pages
from storage.checksums import CRC64NVME
from storage.huge_pages import HugePages
from storage.ranged_copy import RangedCopy
from tests.unit.test_ranged_copy import FAST, ScriptedSource

HUGE = 2 << 20
SIZE = 3 * HUGE + 4097


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in /dev/shm."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("/dev/shm cannot be written")
    folder = Path("/dev/shm", f"nightjar-test-{os.getpid()}-{tmp_path.name}")
    folder.mkdir()
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def reserve(path: Path, num_bytes: int, most_s_per_byte: float = math.inf) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        return HugePages(most_s_per_byte=most_s_per_byte).reserve(fd, num_bytes)
    finally:
        os.close(fd)


def test_an_empty_file_in_memory_becomes_as_long_as_asked_reads_as_zeros_and_lies_on_huge_pages(
    memory: Path,
) -> None:
    done = reserve(memory / "a", SIZE)
    if not done:
        pytest.skip("this kernel makes no huge pages for files: Linux 6.1 or later does")
    assert done == 3 * HUGE
    assert (memory / "a").read_bytes() == bytes(SIZE)
    assert (memory / "a").stat().st_blocks * 512 >= done


@pytest.mark.parametrize("num_bytes", [0, 1, HUGE - 1])
def test_small_files_are_left_alone(memory: Path, num_bytes: int) -> None:
    assert reserve(memory / "a", num_bytes) == 0
    assert (memory / "a").stat().st_size == 0


def test_what_is_there_already_and_what_is_on_a_disk_is_never_touched(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(SIZE)
    (memory / "a").write_bytes(data)
    assert reserve(memory / "a", SIZE) == 0
    assert (memory / "a").read_bytes() == data
    monkeypatch.setattr(huge_pages, "_TMPFS_MAGIC", 0xEF53)  # ext4's
    assert reserve(memory / "b", SIZE) == 0
    assert (memory / "b").stat().st_size == 0


def test_a_kernel_without_huge_pages_is_no_fault(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "_SIZE_PATH", memory / "absent")
    assert reserve(memory / "a", SIZE) == 0
    monkeypatch.undo()
    monkeypatch.setattr(huge_pages, "_MADV_COLLAPSE", 9999)  # as an older kernel answers: EINVAL
    assert reserve(memory / "b", SIZE) == 0
    assert (memory / "b").stat().st_size == SIZE


def test_memory_that_costs_too_much_is_given_up_after_one_step_for_all_files(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "_STEP_BYTES", HUGE)
    huge = HugePages(most_s_per_byte=0.0)
    done = []
    for name in "ab":
        fd = os.open(memory / name, os.O_RDWR | os.O_CREAT)
        done.append(huge.reserve(fd, SIZE))
        os.close(fd)
    assert done in ([HUGE, 0], [0, 0])  # none where the kernel makes none
    assert (memory / "a").read_bytes() == bytes(SIZE)


def test_a_copy_into_memory_is_the_file_and_a_copy_that_died_is_taken_up_where_it_was(
    memory: Path,
) -> None:
    data = {"w.bin": os.urandom(20_000_000), "small.json": b"{}"}
    for num_tries in (1, 2):
        source = ScriptedSource(data)
        copier = RangedCopy(source, memory, direct=False, num_threads=2, retry=FAST)
        copier.resume(source.list_files())
        copier.allocate()
        copier.run()
        assert (memory / "w.bin").read_bytes() == data["w.bin"]
        assert copier.checksums["w.bin"].algorithm == CRC64NVME.name
        # Taken up: whole files are checked again, and not one byte of them is asked for or zeroed.
        assert len(source.opened) == (3 if num_tries == 1 else 0)
