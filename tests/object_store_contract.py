"""What every object store must do, as one suite of tests; inherit it and give it a `store`."""

import threading
from pathlib import Path

import pytest

from storage.errors import AlreadyExists, NotFound, PreconditionFailed
from storage.object_store import ObjectStore

ODD_KEYS = [
    "in put/My Data=1/part 0.parquet",
    "in put/dónde/パート.parquet",
    "in put/a=b/c:d.parquet",
    "k/100%20+&;=:@#?.json",
    "k/~'()!*,$.json",
]
UNSAFE_KEYS = ["", "/etc/passwd", "../secret", "a/../../b", "a\0b", "a\\b", "x" * 300]
MiB = 1 << 20


class ObjectStoreContract:
    """Tests against a fixture `store`, which is empty at first."""

    def test_what_was_put_is_read_back(self, store: ObjectStore) -> None:
        info = store.put("a/b.json", b"one")
        assert store.get("a/b.json") == b"one"
        assert store.head("a/b.json")[:3] == info[:3] == ("a/b.json", 3, info.etag)

    def test_put_replaces_the_object_and_its_etag(self, store: ObjectStore) -> None:
        etags = [store.put("k", data).etag for data in (b"one", b"two", b"six")]
        assert store.get("k") == b"six"
        assert len(set(etags)) == 3
        assert store.head("k").etag == etags[-1]

    def test_an_empty_object_is_an_object(self, store: ObjectStore) -> None:
        store.put("empty", b"")
        assert store.get("empty") == b""
        assert store.head("empty").size == 0

    def test_what_is_not_there_is_not_found(self, store: ObjectStore, tmp_path: Path) -> None:
        for request in (
            lambda: store.get("none"),
            lambda: store.head("none"),
            lambda: store.get_range("none", 0, 1),
            lambda: store.download("none", tmp_path / "none"),
            lambda: store.copy("none", "other"),
            lambda: store.put_if_match("none", b"x", "0" * 32),
        ):
            with pytest.raises(NotFound):
                request()
        assert list(store.list()) == []

    def test_a_range_is_a_slice_of_the_object(self, store: ObjectStore) -> None:
        etag = store.put("k", b"0123456789").etag
        assert store.get_range("k", 2, 5) == b"234"
        assert store.get_range("k", 8, 99, if_match=etag) == b"89"
        assert store.get_range("k", 10, 12) == b""
        assert store.get_range("k", 3, 3) == b""
        with pytest.raises(ValueError, match="need 0 <= start <= end"):
            store.get_range("k", 5, 2)

    def test_a_range_of_a_replaced_object_is_refused(self, store: ObjectStore) -> None:
        etag = store.put("k", b"old").etag
        store.put("k", b"new")
        with pytest.raises(PreconditionFailed):
            store.get_range("k", 0, 3, if_match=etag)

    def test_create_only_refuses_a_taken_key_and_keeps_its_bytes(self, store: ObjectStore) -> None:
        store.put_if_absent("k", b"first")
        with pytest.raises(AlreadyExists):
            store.put_if_absent("k", b"later")
        assert store.get("k") == b"first"

    def test_create_only_knows_its_own_bytes_again(self, store: ObjectStore) -> None:
        etag = store.put_if_absent("k", b"nonce 1").etag
        assert store.put_if_absent("k", b"nonce 1").etag == etag

    def test_a_deleted_key_can_be_created_again(self, store: ObjectStore) -> None:
        store.put_if_absent("a/b/k", b"first")
        store.delete("a/b/k")
        store.delete("a/b/k")
        store.put_if_absent("a/b/k", b"second")
        assert store.get("a/b/k") == b"second"

    def test_of_three_racing_creators_exactly_one_wins(self, store: ObjectStore) -> None:
        for number in range(5):
            key, start, won = f"race/{number}", threading.Barrier(3), []

            def create(
                racer: int,
                key: str = key,
                start: threading.Barrier = start,
                won: list[int] = won,
            ) -> None:
                start.wait()
                try:
                    store.put_if_absent(key, b"racer %d" % racer)
                    won.append(racer)
                except AlreadyExists:
                    pass

            run_threads(create, 3)
            assert len(won) == 1
            assert store.get(key) == b"racer %d" % won[0]

    def test_a_swap_needs_the_etag_that_is_there(self, store: ObjectStore) -> None:
        first = store.put("k", b"1").etag
        second = store.put_if_match("k", b"2", first).etag
        with pytest.raises(PreconditionFailed):
            store.put_if_match("k", b"3", first)
        assert store.get("k") == b"2"
        assert store.put_if_match("k", b"4", second).etag == store.head("k").etag

    def test_swapped_counters_lose_no_step(self, store: ObjectStore) -> None:
        store.put("counter", b"0")

        def count(racer: int) -> None:
            for _ in range(5):
                while True:
                    etag = store.head("counter").etag
                    value = int(store.get("counter").split()[0])
                    try:
                        # The racer's number keeps equal counts from being equal bytes.
                        store.put_if_match("counter", b"%d by %d" % (value + 1, racer), etag)
                        break
                    except PreconditionFailed:
                        continue

        run_threads(count, 3)
        assert store.get("counter").split()[0] == b"15"

    def test_a_file_goes_up_and_comes_down_whole(self, store: ObjectStore, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        for size in (0, 10, 20 * MiB + 7):
            source.write_bytes((b"%016d" % size * (size // 16 + 1))[:size])
            info = store.upload(source, f"files/{size}")
            assert info.size == size
            assert store.download(f"files/{size}", target, if_match=info.etag)[:3] == info[:3]
            assert target.read_bytes() == source.read_bytes()

    def test_a_refused_download_leaves_no_file(self, store: ObjectStore, tmp_path: Path) -> None:
        store.put("k", b"bytes")
        folder = tmp_path / "into"
        folder.mkdir()
        with pytest.raises(PreconditionFailed):
            store.download("k", folder / "file", if_match="0" * 32)
        assert list(folder.iterdir()) == []

    def test_a_copy_has_the_bytes_and_replaces_what_was_there(self, store: ObjectStore) -> None:
        store.put("from", b"new")
        store.put("to/there", b"old")
        info = store.copy("from", "to/there")
        assert store.get("to/there") == b"new"
        assert (info.key, info.size) == ("to/there", 3)
        assert store.head("to/there").etag == info.etag

    def test_a_listing_is_in_byte_order_and_only_of_the_prefix(self, store: ObjectStore) -> None:
        names = ["o/a-b", "o/a/b", "o/a0", "o/Z", "o/é", "o/a/c/d", "p", "o/b/x"]
        for name in names:
            store.put(name, name.encode())
        assert [info.key for info in store.list()] == sorted(names, key=str.encode)
        assert [info.key for info in store.list("o/a")] == ["o/a-b", "o/a/b", "o/a/c/d", "o/a0"]
        assert [info.key for info in store.list("o/a/")] == ["o/a/b", "o/a/c/d"]
        assert list(store.list("nothing/")) == []
        for info in store.list():
            assert info[:3] == store.head(info.key)[:3]

    @pytest.mark.parametrize("key", ODD_KEYS)
    def test_a_key_is_kept_byte_for_byte(self, store: ObjectStore, key: str) -> None:
        store.put_if_absent(key, key.encode())
        assert [info.key for info in store.list()] == [key]
        assert [info.key for info in store.list(key.rpartition("/")[0])] == [key]
        store.copy(key, f"{key}.copy")
        assert store.get(f"{key}.copy") == store.get(key) == key.encode()

    @pytest.mark.parametrize("key", UNSAFE_KEYS)
    def test_an_unsafe_key_is_refused(self, store: ObjectStore, key: str) -> None:
        with pytest.raises(ValueError, match="unsafe object key"):
            store.put(key, b"x")
        with pytest.raises(ValueError, match="unsafe object key"):
            store.get(key)


def run_threads(work: object, count: int) -> None:
    """Run `work(0)`, `work(1)`, ... at the same time; the first exception is raised here."""
    faults: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)  # type: ignore[operator]
        except BaseException as error:  # handed to the test, not swallowed
            faults.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
