import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.errors import AccessDenied, AlreadyExists, NoSpace, NotFound, StoreUnfit
from storage.local_store import LocalStore

MiB = 1 << 20
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.mark.parametrize("size", [100, 9 * MiB])
def test_bytes_changed_in_place_under_the_same_size_and_time_change_the_etag(
    tmp_path: Path, size: int
) -> None:
    path = tmp_path / "prompts.jsonl"
    etags = []
    for byte in (b"1", b"2"):
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(byte * size)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        etags.append(LocalStore(tmp_path).head("prompts.jsonl").etag)
    assert path.stat().st_size == size
    assert etags[0] != etags[1]


def test_an_untouched_file_keeps_its_etag_when_the_store_is_opened_again(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(9 * MiB))
    (tmp_path / "small").write_bytes(b"x")
    for key in ("big", "small"):
        assert LocalStore(tmp_path).head(key) == LocalStore(tmp_path).head(key)


@pytest.mark.parametrize("moment", ["local_before_link", "local_before_rename"])
def test_a_writer_killed_before_its_last_step_leaves_nothing_to_see(
    store: LocalStore, moment: str
) -> None:
    run_writer(store, moment)
    assert list(store.list()) == []
    with pytest.raises(NotFound):
        store.get("k")
    assert store.sweep() == 1
    assert store.sweep() == 0


@pytest.mark.parametrize("moment", ["local_after_link", "local_after_rename"])
def test_a_writer_killed_after_its_last_step_leaves_the_whole_object(
    store: LocalStore, moment: str
) -> None:
    run_writer(store, moment)
    assert [info.key for info in store.list()] == ["k"]
    assert store.get("k") == b"x" * MiB
    store.sweep()
    assert store.get("k") == b"x" * MiB


def test_a_sweep_leaves_the_files_of_living_writers_alone(store: LocalStore) -> None:
    def write_slowly(file: object) -> None:
        assert store.sweep() == 0

    store._put("k", 0, write_slowly)
    assert store.get("k") == b""


def test_of_three_racing_processes_exactly_one_creates_each_key(store: LocalStore) -> None:
    script = (
        "import sys, os\n"
        "from storage.local_store import LocalStore\n"
        "from storage.errors import AlreadyExists\n"
        "store = LocalStore(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for number in range(40):\n"
        "    try:\n"
        "        store.put_if_absent(f'k/{number}', sys.argv[2].encode() * 1000)\n"
        "        print(number, flush=True)\n"
        "    except AlreadyExists:\n"
        "        pass\n"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script, store.uri, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            text=True,
        )
        for name in "abc"
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = [set(map(int, racer.communicate(timeout=60)[0].split())) for racer in racers]
    assert sorted(number for numbers in won for number in numbers) == list(range(40))
    for name, numbers in zip("abc", won, strict=True):
        for number in numbers:
            assert store.get(f"k/{number}") == name.encode() * 1000


def test_a_folder_without_hard_links_is_refused_unless_one_writer_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StoreUnfit, match="no hard links"):
        LocalStore(tmp_path).put_if_absent("k", b"x")
    single = LocalStore(tmp_path, allow_single_writer=True)
    single.put_if_absent("k", b"x")
    with pytest.raises(AlreadyExists):
        single.put_if_absent("k", b"y")
    assert single.get("k") == b"x"
    assert not single.can_link()


def test_a_link_whose_reply_was_lost_is_known_as_ours(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)  # what NFS does when the first reply is lost

    monkeypatch.setattr(os, "link", link_twice)
    store.put_if_absent("k", b"mine")
    assert store.get("k") == b"mine"
    with pytest.raises(AlreadyExists):
        store.put_if_absent("k", b"yours")


def test_a_full_disk_is_told_with_path_needed_and_free_and_leaves_nothing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace, match=r"store/a/k: needed 5 bytes, free \d+"):
        store.put("a/k", b"12345")
    assert [path for path in Path(store.uri).rglob("*") if path.is_file()] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_access_denied(store: LocalStore) -> None:
    store.put("k", b"x")
    (Path(store.uri) / "k").chmod(0)
    with pytest.raises(AccessDenied):
        store.get("k")


def test_symbolic_links_are_followed_and_a_dead_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "one").write_bytes(b"1")
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").symlink_to(tmp_path / "blobs" / "one")
    (root / "folder").symlink_to(tmp_path / "blobs")
    (root / "loop").symlink_to(root)
    store = LocalStore(root)
    assert [info.key for info in store.list()] == ["file", "folder/one"]
    (root / "dead").symlink_to(tmp_path / "nothing")
    with pytest.raises(NotFound, match="dead: a symbolic link to nothing"):
        list(store.list())


@pytest.mark.parametrize("key", ["a/", "a//b", "./a", "a/./b", ".nj-x", "a/.nj-lock"])
def test_keys_a_folder_cannot_keep_apart_are_refused(store: LocalStore, key: str) -> None:
    with pytest.raises(ValueError, match="unsafe object key"):
        store.put(key, b"x")


def test_deleting_the_last_object_takes_its_empty_folders_along(store: LocalStore) -> None:
    store.put("a/b/c/k", b"x")
    store.put("a/other", b"x")
    store.delete("a/b/c/k")
    assert sorted(path.name for path in Path(store.uri).iterdir()) == [".nj-lock", "a"]
    assert [path.name for path in (Path(store.uri) / "a").iterdir()] == ["other"]


def run_writer(store: LocalStore, moment: str) -> None:
    """Write `k` in another process that is killed at the failpoint."""
    verb = "put_if_absent" if moment.endswith("link") else "put"
    script = (
        f"from storage.local_store import LocalStore; "
        f"LocalStore({store.uri!r}).{verb}('k', b'x' * {MiB})"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "NIGHTJAR_FAILPOINT": f"{moment}:kill:1:0"},
        cwd=REPOSITORY,
        check=False,
        timeout=60,
    )
    assert process.returncode == -signal.SIGKILL


def test_an_output_below_a_file_is_refused_by_the_files_name(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("x")
    with pytest.raises(NotFound, match="prompts is a file, not a folder; give another place"):
        LocalStore(tmp_path / "prompts").put("a/b", b"x")
