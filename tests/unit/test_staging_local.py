import errno
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.checksums import file_checksum
from storage.destinations import CACHE_VARIABLE, EngineMemory, HostMemory
from storage.errors import BadInput, CorruptObject, InputChanged, NoSpace, NotFound
from storage.local_source import _FileBody
from storage.model_manifest import ModelManifest, StagedFile
from storage.object_store import StorageConfig
from storage.ranged_copy import BUFFER_BYTES
from storage.staging import find_model, stage_model
from tests.model_files import folder_bytes, write_model

CONFIG = StorageConfig()


def need(weight_bytes: int) -> EngineMemory:
    return EngineMemory.sum_of({"tests": 4000, "nothing": 0})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", num_weight_files=3)


@pytest.fixture
def shm() -> Iterator[Path]:
    """A folder in memory, which tmp_path may not be."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def write_sums(model: Path) -> None:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"
        for path in model.iterdir()
        if path.name != "SHA256SUMS"
    ]
    (model / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def test_a_folder_on_a_local_disk_is_read_in_place(model: Path) -> None:
    with stage_model(str(model), config=CONFIG) as staged:
        assert staged.path == model
        assert staged.report.outcome == "in place"
        assert "local disk" in staged.report.reason
        assert staged.report.verified_by == {"": 7}
        assert staged.lock is None


def test_a_folder_on_a_network_disk_is_copied(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.in_place.disk_kind", lambda path: "network")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    with stage_model(str(model), config=CONFIG) as staged:
        assert staged.path.is_relative_to(tmp_path / "cache" / "models")
        assert staged.report.outcome == "staged"
        assert "free on" in staged.report.reason


def test_a_copy_is_identical_and_the_second_one_is_a_hit(model: Path, tmp_path: Path) -> None:
    with stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "cache")) as first:
        assert folder_bytes(first.path) == folder_bytes(model)
        assert first.report.bytes_moved == first.manifest.num_bytes
    with stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "cache")) as second:
        assert second.path == first.path
        assert second.report.outcome == "hit"
        assert second.report.bytes_moved == 0


def test_the_content_id_is_the_same_wherever_the_model_is_read(model: Path, tmp_path: Path) -> None:
    in_place = stage_model(str(model), config=CONFIG)
    with stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "c")) as copied:
        assert in_place.content_id == copied.content_id
    assert stage_model(f"file://{model}", config=CONFIG).content_id == in_place.content_id
    os.utime(model / "config.json")
    touched = stage_model(str(model), config=CONFIG).content_id
    assert touched != in_place.content_id
    weights = model / "model-00002-of-00003.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    assert stage_model(str(model), config=CONFIG).content_id not in (in_place.content_id, touched)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_large_file_edited_in_the_middle_is_another_model(
    tmp_path: Path, is_recorded: bool
) -> None:
    model = write_model(tmp_path / "model", num_weight_files=1, weight_bytes=4 << 20)
    weights, cache = model / "model-00001-of-00001.safetensors", str(tmp_path / "cache")
    if is_recorded:
        write_sums(model)
    stage_model(str(model), config=CONFIG, stage_to=cache).close()
    with weights.open("r+b") as file:
        file.seek((2 << 20) + (128 << 10))
        file.write(b"edited")
    if is_recorded:
        with pytest.raises(CorruptObject, match="SHA-256 is not the one in SHA256SUMS"):
            stage_model(str(model), config=CONFIG, stage_to=cache)
        write_sums(model)
    with stage_model(str(model), config=CONFIG, stage_to=cache) as again:
        assert again.report.outcome == "staged"
        assert folder_bytes(again.path).items() >= {weights.name: weights.read_bytes()}.items()


def test_other_promises_make_another_model(model: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    write_sums(model)
    stage_model(str(model), config=CONFIG, stage_to=cache).close()
    sums = model / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(sums.read_text()[:64], "0" * 64))
    with pytest.raises(CorruptObject, match="SHA-256 is not the one"):
        stage_model(str(model), config=CONFIG, stage_to=cache)


def test_a_model_is_found_without_moving_it_only_where_it_is(model: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    in_place = find_model(str(model), config=CONFIG)
    assert in_place is not None
    assert in_place.path == model
    assert find_model(str(model), config=CONFIG, stage_to=cache) is None
    stage_model(str(model), config=CONFIG, stage_to=cache).close()
    found = find_model(str(model), config=CONFIG, stage_to=cache)
    assert found is not None
    assert found.report.outcome == "hit"
    found.close()


def test_files_are_announced_as_they_become_whole_and_weights_last(
    model: Path, tmp_path: Path
) -> None:
    seen: list[str] = []
    progress: list[tuple[int, int]] = []
    with stage_model(
        str(model),
        config=CONFIG,
        stage_to=str(tmp_path / "cache"),
        num_threads=1,
        on_file=lambda path: seen.append(path.name),
        on_progress=lambda done, total: progress.append((done, total)),
    ) as staged:
        assert sorted(seen) == sorted(file.name for file in staged.manifest.files)
        assert all(name.endswith(".safetensors") for name in seen[-3:])
        assert progress[-1] == (staged.manifest.num_bytes, staged.manifest.num_bytes)


def test_a_missing_shard_is_named_and_no_weights_are_moved(model: Path, tmp_path: Path) -> None:
    (model / "model-00002-of-00003.safetensors").unlink()
    for stage_to in ("auto", str(tmp_path / "cache")):
        with pytest.raises(BadInput, match=r"model-00002-of-00003\.safetensors"):
            stage_model(str(model), config=CONFIG, stage_to=stage_to)
    assert not list((tmp_path / "cache").rglob("model-*"))
    assert not list((tmp_path / "cache").rglob("MANIFEST.json"))


def test_what_is_skipped_is_listed(model: Path, tmp_path: Path) -> None:
    for name in ("modeling_x.py", "pytorch_model.bin", "extra.safetensors"):
        (model / name).write_bytes((model / "model-00001-of-00003.safetensors").read_bytes())
    with stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "cache")) as staged:
        skipped = ["extra.safetensors", "modeling_x.py", "pytorch_model.bin"]
        assert staged.report.skipped == staged.manifest.skipped == skipped
        assert not set(skipped) & {path.name for path in staged.path.iterdir()}


def test_a_file_rewritten_while_it_is_read_is_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model", num_weight_files=1, weight_bytes=4 << 20)
    weights, cache = model / "model-00001-of-00001.safetensors", tmp_path / "cache"
    read = _FileBody.readinto

    def rewrite_once(body: _FileBody, view: memoryview) -> int:
        count = read(body, view)
        if len(view) == BUFFER_BYTES:
            monkeypatch.setattr(_FileBody, "readinto", read)
            with weights.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"X")
        return count

    monkeypatch.setattr(_FileBody, "readinto", rewrite_once)
    with pytest.raises(InputChanged, match=r"00001-of-00001\.safetensors: changed.*stage it again"):
        stage_model(str(model), config=CONFIG, stage_to=str(cache))
    assert not list(cache.rglob("MANIFEST.json"))
    with stage_model(str(model), config=CONFIG, stage_to=str(cache)) as staged:
        assert folder_bytes(staged.path) == folder_bytes(model)


def test_a_model_touched_after_staging_is_staged_again(model: Path, tmp_path: Path) -> None:
    with stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "cache")) as first:
        (first.path / "config.json").write_text("{}")
    with stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "cache")) as second:
        assert second.report.outcome == "staged"
        assert folder_bytes(second.path) == folder_bytes(model)


def test_a_reader_of_a_touched_model_keeps_the_files_it_opened(model: Path, tmp_path: Path) -> None:
    with stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "cache")) as first:
        weights = first.path / "model-00001-of-00003.safetensors"
        before = weights.read_bytes()
        with weights.open("rb") as opened:
            os.utime(weights)
            stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "cache")).close()
            assert opened.read() == before


@pytest.mark.parametrize("stage_to", ["auto", "cache"])
def test_recorded_sha256_sums_are_compared(model: Path, tmp_path: Path, stage_to: str) -> None:
    target = stage_to if stage_to == "auto" else str(tmp_path / stage_to)
    write_sums(model)
    with stage_model(str(model), config=CONFIG, stage_to=target) as staged:
        assert staged.report.verified_by == {"SHA256SUMS": 7}
    weights = model / "model-00003-of-00003.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CorruptObject, match=r"00003-of-00003\.safetensors.*SHA"):
        stage_model(str(model), config=CONFIG, stage_to=target)
    found = list((tmp_path / "cache").rglob("MANIFEST.json")) if stage_to == "cache" else []
    assert len(found) <= 1, "only the first, right one is whole"


def test_a_staged_folder_vouches_for_its_copies(model: Path, tmp_path: Path) -> None:
    with stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "a")) as first:
        with stage_model(str(first.path), config=CONFIG, stage_to=str(tmp_path / "b")) as second:
            assert second.report.verified_by == {"MANIFEST.json": 7}
        in_place = stage_model(str(first.path), config=CONFIG)
        assert in_place.report.verified_by == {"MANIFEST.json": 7}
        assert in_place.content_id == in_place.manifest.content_id == first.content_id
        (first.path / "tokenizer.json").write_text("{'other'}")
        with pytest.raises(CorruptObject, match=r"tokenizer\.json: MANIFEST\.json promises"):
            stage_model(str(first.path), config=CONFIG)


def write_manifest(model: Path, checksum_of: Callable[[Path], str]) -> None:
    """A MANIFEST.json that names every file's checksum."""
    files = [
        StagedFile(
            name=path.name,
            size=path.stat().st_size,
            checksum=checksum_of(path),
            verified_by="the Hub",
            mtime_ns=0,
        )
        for path in model.iterdir()
    ]
    manifest = ModelManifest(
        content_id="0" * 32, source="", num_bytes=0, files=files, skipped=[], staged_at=""
    )
    (model / "MANIFEST.json").write_bytes(manifest.to_json())


@pytest.mark.parametrize("stage_to", ["auto", "cache"])
def test_git_s_digests_are_compared(model: Path, tmp_path: Path, stage_to: str) -> None:
    target = stage_to if stage_to == "auto" else str(tmp_path / stage_to)
    write_manifest(model, lambda path: str(file_checksum(path, "git-sha1")))
    with stage_model(str(model), config=CONFIG, stage_to=target) as staged:
        assert staged.report.verified_by == {"MANIFEST.json": 7}
    (model / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0}}}')
    with pytest.raises(CorruptObject, match=r"tokenizer\.json: .*MANIFEST\.json"):
        stage_model(str(model), config=CONFIG, stage_to=target)


@pytest.mark.parametrize("stage_to", ["auto", "cache"])
def test_a_promise_of_an_unknown_kind_is_none(model: Path, tmp_path: Path, stage_to: str) -> None:
    target = stage_to if stage_to == "auto" else str(tmp_path / stage_to)
    write_manifest(model, lambda path: "blake9:aa")
    with stage_model(str(model), config=CONFIG, stage_to=target) as staged:
        assert staged.report.verified_by == {"": 7}
    write_manifest(model, lambda path: "aa")
    with pytest.raises(CorruptObject, match=r"MANIFEST\.json: .*: not a checksum: 'aa'"):
        stage_model(str(model), config=CONFIG, stage_to=target)


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"manifest_version": 3}'])
@pytest.mark.parametrize("stage_to", ["auto", "cache"])
def test_a_manifest_of_another_tool_is_no_record(
    model: Path, tmp_path: Path, stage_to: str, content: str
) -> None:
    target = stage_to if stage_to == "auto" else str(tmp_path / stage_to)
    (model / "MANIFEST.json").write_text(content)
    with stage_model(str(model), config=CONFIG, stage_to=target) as staged:
        assert staged.report.verified_by == {"": 7}
    (model / "MANIFEST.json").write_text('{"content_id": "cut off')
    with pytest.raises(CorruptObject, match="not a model manifest"):
        stage_model(str(model), config=CONFIG, stage_to=target)


@pytest.mark.parametrize("stage_to", ["auto", "cache"])
def test_a_link_to_nothing_is_no_file_and_a_pipe_is_refused_at_once(
    model: Path, tmp_path: Path, stage_to: str
) -> None:
    target = stage_to if stage_to == "auto" else str(tmp_path / stage_to)
    (model / "generation_config.json").symlink_to("gone")
    os.mkfifo(model / "not-read.sock")
    with stage_model(str(model), config=CONFIG, stage_to=target) as staged:
        assert len(staged.manifest.files) == 7
    for name in ("tokenizer_config.json", "SHA256SUMS"):
        os.mkfifo(model / name)
        with pytest.raises(BadInput, match=f"{name}: no regular file"):
            stage_model(str(model), config=CONFIG, stage_to=target)
        (model / name).unlink()
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(BadInput, match=r"pipe\.gguf: neither a folder nor a file"):
        stage_model(str(tmp_path / "pipe.gguf"), config=CONFIG, stage_to=target)


@pytest.mark.parametrize("stage_to", ["auto", "cache"])
def test_a_small_file_that_links_out_of_its_folder_is_refused(
    model: Path, tmp_path: Path, stage_to: str
) -> None:
    target = stage_to if stage_to == "auto" else str(tmp_path / stage_to)
    secret = tmp_path / "credentials"
    secret.write_text("secret")
    (model / "extra_template.jinja").symlink_to(secret)
    with pytest.raises(BadInput, match=r"extra_template\.jinja: a link to .*/credentials, outside"):
        stage_model(str(model), config=CONFIG, stage_to=target)
    (model / "extra_template.jinja").unlink()
    (model / "extra_template.jinja").symlink_to("chat_template.jinja")
    weights = model / "model-00001-of-00003.safetensors"
    weights.rename(tmp_path / "w")
    weights.symlink_to(tmp_path / "w")
    with stage_model(str(model), config=CONFIG, stage_to=target) as staged:
        assert len(staged.manifest.files) == 8


@pytest.mark.parametrize("stage_to", ["auto", "cache"])
def test_a_snapshot_in_a_hub_cache_is_read_through_its_links(
    model: Path, tmp_path: Path, stage_to: str
) -> None:
    target = stage_to if stage_to == "auto" else str(tmp_path / stage_to)
    repo = tmp_path / "models--org--name"
    model.rename(repo.parent / "blobs")
    repo.mkdir()
    (repo.parent / "blobs").rename(repo / "blobs")
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for blob in (repo / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    with stage_model(str(snapshot), config=CONFIG, stage_to=target) as staged:
        assert folder_bytes(staged.path) == folder_bytes(repo / "blobs")


def test_a_partial_or_missing_manifest_is_never_a_hit(model: Path, tmp_path: Path) -> None:
    with stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "cache")) as first:
        manifest = first.path / "MANIFEST.json"
    whole = manifest.read_bytes()
    for damaged in (b"", whole[:100], whole.replace(b'"format": 1', b'"format": 9'), b"[]"):
        manifest.write_bytes(damaged)
        with stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "cache")) as again:
            assert again.report.outcome == "staged"
            assert (
                again.manifest.files
                == ModelManifest.from_json(manifest.read_bytes(), source="test").files
            )


def test_several_threads_stage_one_model_once(model: Path, tmp_path: Path) -> None:
    outcomes: list[str] = []

    def stage() -> None:
        with stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "cache")) as staged:
            outcomes.append(staged.report.outcome)
            time.sleep(0.05)

    threads = [threading.Thread(target=stage) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["hit"] * 4 + ["staged"]


def test_little_memory_sends_the_model_to_disk(
    model: Path, tmp_path: Path, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.in_place.disk_kind", lambda path: "network")
    monkeypatch.setenv(CACHE_VARIABLE, f"{shm}:{tmp_path}/cache")
    monkeypatch.setattr("storage.model_caches.host_memory", lambda: HostMemory(5000, "test"))
    with stage_model(str(model), config=CONFIG, engine_memory=need) as staged:
        assert staged.path.is_relative_to(tmp_path)
        assert (
            "+ engine 0.0 MB (0.0 MB for tests) = 0.0 MB > 0.0 MB of memory (test)"
            in staged.report.reason
        )
    monkeypatch.setattr("storage.model_caches.host_memory", lambda: HostMemory(10**9, "test"))
    with stage_model(str(model), config=CONFIG, engine_memory=need) as staged:
        assert staged.report.outcome == "hit", "it stays where it is"
    write_model(model, num_weight_files=4)
    with stage_model(str(model), config=CONFIG, engine_memory=need) as staged:
        assert staged.path.is_relative_to(shm)
        assert staged.report.disk == "memory"


def test_a_disk_that_fills_up_meanwhile_sends_the_model_to_the_next_one(
    model: Path, tmp_path: Path, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.in_place.disk_kind", lambda path: "network")
    monkeypatch.setenv(CACHE_VARIABLE, f"{shm}:{tmp_path}/cache")

    def fail_in_memory(fd: int, offset: int, num_bytes: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(str(shm)):
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("os.posix_fallocate", fail_in_memory)
    with stage_model(str(model), config=CONFIG) as staged:
        assert staged.path.is_relative_to(tmp_path)
        assert f"{shm}/models/{staged.content_id}: " in staged.report.reason
    assert list((shm / "models").iterdir()) == [], "nothing is left where it did not fit"


def test_a_network_folder_that_fits_nowhere_is_read_in_place_and_the_arithmetic_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.in_place.disk_kind", lambda path: "network")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("storage.destinations.free_bytes", lambda folder: 5 * 10**8)
    with stage_model(str(model), config=CONFIG) as staged:
        assert (staged.path, staged.report.outcome) == (model, "in place")
        assert "fits nowhere: weights 0.0 MB + 1.1 GB spare > 0.5 GB free" in staged.report.reason
    for stage_to in ("nvme", str(tmp_path / "full")):
        monkeypatch.setattr("storage.cache_room.free_bytes", lambda folder: 10)
        with pytest.raises(NoSpace):
            stage_model(str(model), config=CONFIG, stage_to=stage_to)


def test_a_machine_without_a_folder_to_stage_to_reads_in_place(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.in_place.disk_kind", lambda path: "network")
    monkeypatch.setenv(CACHE_VARIABLE, "/proc/nowhere")
    with stage_model(str(model), config=CONFIG) as staged:
        assert (staged.path, staged.report.outcome) == (model, "in place")
        assert "no folder to stage to can be written" in staged.report.reason


@pytest.mark.parametrize(
    ("source", "stage_to", "error", "message"),
    [
        ("/nowhere/at/all", "auto", NotFound, "no such folder; give a model folder, s3://"),
        ("ftp://host/model", "auto", BadInput, "unknown scheme ftp"),
        ("s3://bucket", "auto", BadInput, "needs a bucket and a prefix"),
        ("s3://bucket/m/", "none", BadInput, "cannot be read in place"),
        ("hf://a/b/c", "auto", BadInput, "not of the form"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    source: str,
    stage_to: str,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    with pytest.raises(error, match=message) as caught:
        stage_model(source, config=CONFIG, stage_to=stage_to)
    assert "\n" not in str(caught.value)


@pytest.mark.timing
def test_the_second_stage_takes_no_time(model: Path, tmp_path: Path) -> None:
    stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "cache")).close()
    began = time.perf_counter()
    stage_model(str(model), config=CONFIG, stage_to=str(tmp_path / "cache")).close()
    assert time.perf_counter() - began < 0.2
