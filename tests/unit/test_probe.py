import errno
import os
from pathlib import Path

import pytest

from storage.errors import StorageError, StoreUnavailable, StoreUnfit
from storage.local_store import LocalStore
from storage.memory_store import MemoryStore
from storage.object_store import ObjectInfo
from storage.probe import probe_store


class ForgetfulStore(MemoryStore):
    """Ignores create-only, as some S3 servers do."""

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        return self.put(key, data)


class RacyStore(MemoryStore):
    """Honours create-only one after the other, but not at the same time."""

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo:
        return self.put(key, data) if key.endswith("race") else super().put_if_absent(key, data)


class CarelessStore(MemoryStore):
    """Ignores If-Match."""

    def put_if_match(self, key: str, data: bytes, etag: str) -> ObjectInfo:
        return self.put(key, data)


class FailingStore(MemoryStore):
    def put_if_match(self, key: str, data: bytes, etag: str) -> ObjectInfo:
        raise StoreUnavailable("503")


def test_a_fit_store_is_found_fit_and_left_as_it_was(
    memory_store: MemoryStore, tmp_path: Path
) -> None:
    for store in (memory_store, LocalStore(tmp_path)):
        found = probe_store(store)
        assert found.is_fit
        assert found.faults == []
        assert found.swaps
        assert found.pins_ranges
        assert list(store.list()) == []
    assert found.has_links
    assert abs(found.clock_skew_s) < 5


@pytest.mark.parametrize(
    ("store", "fault"),
    [
        (ForgetfulStore(), "a create-only write replaced an object"),
        (RacyStore(), "several create-only writes at once succeeded"),
    ],
)
def test_a_store_that_breaks_create_only_is_refused_unless_one_writer_is_promised(
    store: MemoryStore, fault: str
) -> None:
    with pytest.raises(StoreUnfit, match=f"{fault}.*allow_single_writer"):
        probe_store(store)
    assert list(store.list()) == []
    assert not probe_store(store, allow_single_writer=True).is_fit


def test_a_store_that_ignores_swaps_only_loses_leases() -> None:
    found = probe_store(CarelessStore())
    assert not found.swaps
    assert found.faults == ["If-Match on a write is ignored"]


def test_a_probe_that_fails_cleans_up_and_tells_its_own_fault() -> None:
    store = FailingStore()
    with pytest.raises(StorageError, match="503"):
        probe_store(store)
    assert list(store.list()) == []


def test_a_folder_without_hard_links_is_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StoreUnfit, match="no hard links"):
        probe_store(LocalStore(tmp_path))
    single = LocalStore(tmp_path, allow_single_writer=True)
    assert probe_store(single, allow_single_writer=True).has_links is False
