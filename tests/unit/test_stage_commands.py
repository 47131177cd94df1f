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
