"""`nightjar stage` and `nightjar gc` on models in a folder of the user's choice."""

import os
from pathlib import Path

import pytest

from storage.model_cache import ModelCache
from tests.model_files import write_model
from tests.pipeline import Nightjar


@pytest.fixture
def nightjar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Nightjar:
    monkeypatch.setenv("NIGHTJAR_CACHE", str(tmp_path / "ours"))
    return Nightjar(tmp_path, capsys)


def test_models_in_a_named_folder_are_listed_pinned_and_evicted_there(
    nightjar: Nightjar, tmp_path: Path
) -> None:
    model, there = str(write_model(tmp_path / "m")), ["--to", str(tmp_path / "there")]
    staged = nightjar.call("stage", model, *there, "--pin", "--json")
    assert staged.code == 0, staged.err
    (entry,) = nightjar.call("stage", "--list", *there, "--json").document["models"]
    assert (entry["source"], entry["is_pinned"], entry["is_whole"]) == (model, True, True)
    assert nightjar.call("stage", "--list", "--json").document["models"] == []
    assert nightjar.call("stage", model, "--unpin").code == 2, "it is not among ours"
    assert nightjar.call("stage", model, *there, "--unpin").code == 0
    (entry,) = nightjar.call("stage", "--list", *there, "--json").document["models"]
    assert not entry["is_pinned"]
    (gone,) = nightjar.call("stage", model, *there, "--evict", "--json").document["evicted"]
    assert gone["freed_bytes"] > 0
    assert nightjar.call("stage", "--list", *there, "--json").document["models"] == []


def test_a_model_read_in_place_has_nothing_to_pin_and_says_so(
    nightjar: Nightjar, tmp_path: Path
) -> None:
    model, there = str(write_model(tmp_path / "m")), ["--to", str(tmp_path / "there")]
    said = nightjar.call("stage", model, "--pin")
    assert said.code == 0, said.err
    assert "Nothing to pin: it lies in no cache" in said.out
    copy = nightjar.call("stage", model, *there, "--json").document
    assert not copy["is_pinned"]
    assert nightjar.call("stage", copy["path"], "--pin", "--json").document["is_pinned"]
    (entry,) = nightjar.call("stage", "--list", *there, "--json").document["models"]
    assert entry["is_pinned"], "it lies in a cache, wherever that is"


@pytest.mark.parametrize("folder", ["ours", "there"])
def test_gc_takes_what_an_abandoned_staging_left(
    nightjar: Nightjar, tmp_path: Path, folder: str
) -> None:
    cache = ModelCache(tmp_path / folder)
    cache.prepare()
    cache.path("abandoned").mkdir()
    (cache.path("abandoned") / "x.safetensors.partial").write_bytes(b"x" * 5000)
    cache.use("abandoned").close()
    where = [] if folder == "ours" else ["--to", str(cache.root)]
    assert nightjar.call("gc", *where, "--json").document["evicted"] == [], "it is too young"
    os.utime(cache.root / "locks" / "abandoned.use", (0, 0))
    (gone,) = nightjar.call("gc", *where, "--json").document["evicted"]
    assert gone["content_id"] == "abandoned"
    assert not cache.path("abandoned").exists()


def test_a_budget_evicts_the_least_recently_used_models(nightjar: Nightjar, tmp_path: Path) -> None:
    models = [write_model(tmp_path / name, weight_bytes=100_000) for name in ("a", "b", "c")]
    there = ["--to", str(tmp_path / "there")]
    for seconds, model in enumerate(models[:2]):
        content_id = nightjar.call("stage", str(model), *there, "--json").document["content_id"]
        os.utime(tmp_path / "there" / "locks" / f"{content_id}.use", (seconds, seconds))
    staged = nightjar.call("stage", str(models[2]), *there, "--budget", "500kB", "--json")
    assert len(staged.document["evicted"]) == 1

    def names() -> list[str]:
        found = nightjar.call("stage", "--list", *there, "--json").document["models"]
        return [Path(entry["source"]).name for entry in found]

    assert names() == ["b", "c"]
    said = nightjar.call("gc", *there, "--budget", "300kB", "--dry-run")
    assert "would be evicted, 0.2 MB to be freed" in said.out
    assert names() == ["b", "c"], "only said"
    (gone,) = nightjar.call("gc", *there, "--budget", "300kB", "--json").document["evicted"]
    assert gone["kept_because"] == ""
    assert names() == ["c"]
    assert nightjar.call("stage", str(models[2]), *there, "--pin").code == 0
    assert "kept, it is pinned" in nightjar.call("gc", *there, "--budget", "1kB").out
    assert nightjar.call("gc", "some/run", "--budget", "1kB").code == 2
    assert "--budget: 'x' is no size" in nightjar.call("gc", "--budget", "x").err
