from pathlib import Path

import pytest

from storage.destinations import (
    CACHE_VARIABLE,
    Destination,
    EngineMemory,
    HostMemory,
    choose,
    disk_kind,
    find_destinations,
    host_memory,
    read_mounts,
)

GIB = 1 << 30
SHM = Destination(root=Path("/dev/shm/n"), kind="memory", free_bytes=64 * GIB)
NVME = Destination(root=Path("/nvme/n"), kind="nvme", free_bytes=500 * GIB)
DISK = Destination(root=Path("/home/n"), kind="disk", free_bytes=900 * GIB)
PLACES = [DISK, SHM, NVME]


def _choose(
    num_bytes: int, available_bytes: int, places: list[Destination] = PLACES
) -> tuple[str, str]:
    choice = choose(
        num_bytes,
        engine=EngineMemory.sum_of({"rows": 8 * GIB}),
        memory=HostMemory(available_bytes, "cgroup limit 96 GB"),
        destinations=places,
    )
    return str(choice.destination.root) if choice.destination else "", choice.reason


def test_weights_go_to_memory_when_they_and_the_engine_fit() -> None:
    root, reason = _choose(16 * GIB, 24 * GIB)
    assert root == "/dev/shm/n"
    assert (
        "weights 17.2 GB + engine 8.6 GB (8.6 GB for rows) = 25.8 GB <= 25.8 GB of memory (cgroup limit"
        in reason
    )


def test_one_byte_too_little_memory_sends_them_to_the_fastest_disk() -> None:
    root, reason = _choose(16 * GIB, 24 * GIB - 1)
    assert root == "/nvme/n"
    assert "25.8 GB > 25.8 GB of memory" in reason
    assert "free on nvme /nvme/n" in reason


def test_a_full_shm_counts_even_when_memory_is_plenty() -> None:
    assert _choose(64 * GIB, 500 * GIB)[0] == "/nvme/n"


def test_the_slower_disk_is_next_and_then_nothing_fits() -> None:
    assert _choose(700 * GIB, 24 * GIB)[0] == "/home/n"
    root, reason = _choose(2000 * GIB, 24 * GIB)
    assert root == ""
    assert reason.count(" > ") == 3, "every place says why not"


def test_the_environment_names_the_places_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, f"{tmp_path}/a:/dev/shm/b")
    assert [place.root for place in find_destinations()] == [tmp_path / "a", Path("/dev/shm/b")]


def test_this_machine_has_a_home_cache_and_shared_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = find_destinations()
    assert places[0].root == tmp_path / "nightjar"
    assert all(place.free_bytes >= 0 for place in places)
    assert disk_kind(Path("/dev/shm")) == "memory"


def test_mount_points_with_spaces_are_read(tmp_path: Path) -> None:
    line = "36 35 98:0 /mnt1 /mnt/a\\040b rw,noatime master:1 - ext4 /dev/root rw,errors=continue\n"
    (tmp_path / "mountinfo").write_text(line)
    assert read_mounts(tmp_path / "mountinfo") == [(Path("/mnt/a b"), "ext4", "98:0")]


def _proc(folder: Path, cgroup: str) -> Path:
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text("MemTotal: 200 kB\nMemAvailable: 1000000 kB\n")
    (folder / "self" / "cgroup").write_text(cgroup)
    return folder


def _files(folder: Path, **values: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(value + "\n")


def test_without_a_limit_the_machine_decides(tmp_path: Path) -> None:
    memory = host_memory(_proc(tmp_path / "proc", "0::/a\n"), tmp_path / "cgroup")
    assert memory == HostMemory(1_024_000_000, "MemAvailable")


def test_the_tightest_cgroup_v2_above_us_counts_and_page_cache_is_free(tmp_path: Path) -> None:
    cgroups = tmp_path / "cgroup"
    stat = "anon 1\nfile 300\nshmem 100"
    _files(cgroups / "a" / "b", memory__max="max", memory__current="600", memory__stat=stat)
    _files(cgroups / "a", memory__max="1000", memory__current="600", memory__stat=stat)
    memory = host_memory(_proc(tmp_path / "proc", "0::/a/b\n"), cgroups)
    assert memory.available_bytes == 1000 - 600 + (300 - 100)
    assert "cgroup limit" in memory.limited_by


def test_cgroup_v1_counts_too_unless_it_is_unlimited(tmp_path: Path) -> None:
    cgroups, proc = tmp_path / "cgroup", _proc(tmp_path / "proc", "4:memory:/x\n1:cpu:/\n")
    stat = "total_cache 50\ntotal_shmem 20"
    _files(
        cgroups / "memory" / "x",
        memory__limit_in_bytes="900",
        memory__usage_in_bytes="500",
        memory__stat=stat,
    )
    assert host_memory(proc, cgroups).available_bytes == 900 - 500 + 30
    _files(cgroups / "memory" / "x", memory__limit_in_bytes=str(2**63 - 4096))
    assert host_memory(proc, cgroups).limited_by == "MemAvailable"


def test_a_cgroup_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    _files(tmp_path / "c", memory__max="10", memory__current="90", memory__stat="file 0\nshmem 0")
    assert host_memory(_proc(tmp_path / "proc", "0::/\n"), tmp_path / "c").available_bytes == 0
