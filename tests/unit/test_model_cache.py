import os
import shutil
import time
from pathlib import Path

import pytest

from storage import cache_room, model_caches
from storage.errors import AccessDenied, BadInput, CorruptObject, NoSpace, NotFound
from storage.model_cache import ModelCache
from storage.object_store import StorageConfig
from storage.staging import StagedModel, stage_model
from tests.model_files import write_model

KB = 1000


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    return ModelCache(tmp_path / "cache")


def stage(
    tmp_path: Path, name: str, *, weight_bytes: int = 100 * KB, budget: int | None = None
) -> StagedModel:
    """Stage a model of its own bytes into the cache."""
    folder = tmp_path / name
    if not folder.exists():
        write_model(folder, num_weight_files=1, weight_bytes=weight_bytes)
        (folder / "name.txt").write_text(name)
    return stage_model(
        str(folder), config=StorageConfig(), stage_to=str(tmp_path / "cache"), budget_bytes=budget
    )


def staged(cache: ModelCache) -> list[str]:
    """Names of the staged models, least recently used first."""
    return [Path(entry.source).name for entry in cache.entries() if entry.is_whole]


def set_last_use(cache: ModelCache, model: StagedModel, age_s: float) -> None:
    path = cache.root / "locks" / f"{model.content_id}.use"
    os.utime(path, (time.time() - age_s,) * 2)


def test_the_least_recently_used_model_goes_when_the_budget_is_full(
    tmp_path: Path, cache: ModelCache
) -> None:
    for age_s, name in ((10, "a"), (30, "b"), (20, "c")):
        with stage(tmp_path, name) as model:
            pass
        set_last_use(cache, model, age_s)
    assert staged(cache) == ["b", "c", "a"]
    with stage(tmp_path, "d", budget=400 * KB) as model:
        assert len(model.report.evicted) == 1
    assert staged(cache) == ["c", "a", "d"]


def test_using_a_model_again_makes_it_recent(tmp_path: Path, cache: ModelCache) -> None:
    for age_s, name in ((30, "a"), (20, "b")):
        with stage(tmp_path, name) as model:
            pass
        set_last_use(cache, model, age_s)
    with stage(tmp_path, "a") as again:
        assert again.report.outcome == "hit"
    assert staged(cache) == ["b", "a"]


def test_what_a_reader_holds_is_never_evicted(tmp_path: Path, cache: ModelCache) -> None:
    held = stage(tmp_path, "held")
    set_last_use(cache, held, 1000)
    with stage(tmp_path, "idle"):
        pass
    with stage(tmp_path, "new", budget=300 * KB):
        pass
    assert "held" in staged(cache)
    assert "idle" not in staged(cache)
    assert cache.evict(held.content_id).kept_because == "a process is using it"
    held.close()
    assert cache.evict(held.content_id).freed_bytes > 100 * KB


def test_a_model_whose_staged_path_is_the_source_is_not_evicted_under_its_reader(
    tmp_path: Path, cache: ModelCache
) -> None:
    with stage(tmp_path, "a") as first:
        pass
    (tmp_path / "link").symlink_to(first.path)
    for path in (first.path, tmp_path / "link"):
        with stage_model(str(path), config=StorageConfig()) as in_place:
            assert in_place.report.outcome == "in place"
            assert in_place.content_id == first.content_id
            assert cache.evict(first.content_id).kept_because == "a process is using it"
    (first.path / "config.json").write_text("[]")
    with pytest.raises(CorruptObject):
        stage_model(str(first.path), config=StorageConfig())
    assert not cache.evict(first.content_id).kept_because


def test_a_staged_copy_outside_a_cache_is_read_without_a_lock(
    tmp_path: Path, cache: ModelCache
) -> None:
    with stage(tmp_path, "a") as first:
        shutil.copytree(first.path, tmp_path / "plain" / "models" / "a")
    with stage_model(str(tmp_path / "plain/models/a"), config=StorageConfig()) as in_place:
        assert in_place.lock is None
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["models"]


def test_a_budget_that_readers_fill_refuses_the_next_model(
    tmp_path: Path, cache: ModelCache
) -> None:
    with stage(tmp_path, "held"), pytest.raises(NoSpace, match=r"needed.*budget 150000 of which"):
        stage(tmp_path, "new", budget=150 * KB)
    assert staged(cache) == ["held"]
    assert [entry.is_whole for entry in cache.entries()] == [True], "no half of the refused one"


def test_nothing_is_evicted_for_a_model_that_would_not_fit_anyway(
    tmp_path: Path, cache: ModelCache
) -> None:
    for name in ("a", "b"):
        stage(tmp_path, name).close()
    with pytest.raises(NoSpace, match=r"budget 150000 of which"):
        stage(tmp_path, "new", weight_bytes=200 * KB, budget=150 * KB)
    assert staged(cache) == ["a", "b"]


def test_a_pinned_model_outlives_the_budget_but_not_a_wish(
    tmp_path: Path, cache: ModelCache
) -> None:
    roots = [cache.root]
    for name in ("pinned", "idle"):
        with stage(tmp_path, name) as model:
            pass
        set_last_use(cache, model, 1000)
    (entry,) = model_caches.pin(str(tmp_path / "pinned"), roots=roots)
    assert entry.is_pinned
    with stage(tmp_path, "new", budget=300 * KB):
        pass
    assert staged(cache) == ["pinned", "new"]
    (eviction,) = model_caches.evict(entry.content_id[:8], roots=roots)
    assert not eviction.kept_because
    assert staged(cache) == ["new"]
    assert not cache.is_pinned(entry.content_id)


def test_a_model_is_named_by_source_or_by_the_beginning_of_its_id(
    tmp_path: Path, cache: ModelCache
) -> None:
    for name in ("a", "b"):
        stage(tmp_path, name).close()
    with pytest.raises(NotFound, match=r"nope: not staged on this node; staged: .*/a, .*/b"):
        model_caches.evict("nope", roots=[cache.root])
    with pytest.raises(BadInput, match="2 staged models match"):
        model_caches.pin("", roots=[cache.root])
    assert [Path(e.source).name for e in model_caches.list_staged([cache.root])] == ["a", "b"]


def test_gc_takes_old_partials_and_trash_but_not_what_is_being_staged(
    tmp_path: Path, cache: ModelCache
) -> None:
    stage(tmp_path, "whole").close()
    for name in ("old", "busy"):
        (cache.models / name).mkdir()
        (cache.models / name / "m.safetensors.partial").write_bytes(b"x" * 10_000)
    (cache.models / ".trash-1").mkdir()
    assert model_caches.gc(min_age_s=3600, roots=[cache.root])[0].content_id == ".trash-1"
    with cache.use("busy"):
        gone = model_caches.gc(min_age_s=0, roots=[cache.root])
    assert [eviction.content_id for eviction in gone] == ["old"]
    assert (cache.models / "busy").exists()
    assert staged(cache) == ["whole"]


def test_an_eviction_that_dies_midway_leaves_nothing_that_looks_whole(
    tmp_path: Path, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stage(tmp_path, "a")
    model.close()

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            cache.evict(model.content_id)
    assert cache.manifest(model.content_id) is None
    with stage(tmp_path, "a") as again:
        assert again.report.outcome == "staged"


def test_an_eviction_whose_trash_is_collected_meanwhile_goes_through(
    tmp_path: Path, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stage(tmp_path, "a") as model:
        pass
    rmtree = shutil.rmtree

    def race(path: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            cache_room.gc(cache)
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr("shutil.rmtree", race)
    assert not cache.evict(model.content_id).kept_because
    assert list(cache.models.iterdir()) == []


def test_folders_are_for_this_user_only(tmp_path: Path, cache: ModelCache) -> None:
    with stage(tmp_path, "a") as model:
        for folder in (cache.root, cache.models, cache.sources, model.path):
            assert folder.stat().st_mode & 0o777 == 0o700
        assert {
            p.stat().st_mode & 0o077 for p in model.path.iterdir() if p.suffix == ".safetensors"
        } == {0}


def test_a_root_that_others_can_write_or_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(AccessDenied, match="nobody else can write in"):
        ModelCache(tmp_path / "open").prepare()
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(AccessDenied):
        ModelCache(tmp_path / "link").prepare()
    (tmp_path / "file").touch()
    with pytest.raises(AccessDenied, match="cannot stage here"):
        ModelCache(tmp_path / "file" / "below").prepare()
