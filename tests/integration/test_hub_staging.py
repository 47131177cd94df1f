import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from inference.content_id import NUM_BLOCKS, WeightSample, sample_spans
from inference.weights import check_model_folder, check_sampled_folder
from storage import hub_requests, hub_source
from storage.disk_space import free_bytes, used_bytes
from storage.errors import AccessDenied, CorruptObject, NoSpace, NotFound, StoreUnavailable
from storage.hub_inputs import HubInputs
from storage.object_store import StorageConfig
from storage.peek import Peeked, peek_model
from storage.staging import stage_model
from tests.fake_hub import COMMIT, FakeHub
from tests.faults.disks import small_disk
from tests.model_files import folder_bytes, safetensors_bytes, write_model
from tests.pipeline import CASES, MODELS, Nightjar

CONFIG = StorageConfig()
SOURCE = "hf://org/model@main"
RESOLVE = "/api/models/org/model/revision/"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    files = folder_bytes(write_model(tmp_path / "model"))
    files["modeling_x.py"] = b"print('no')"
    with FakeHub(files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setenv("NIGHTJAR_CACHE", str(tmp_path / "cache"))
        yield hub


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_requests, "_backoff_s", lambda attempt: 0.01)


def test_a_repo_is_staged_pinned_and_verified(hub: FakeHub, tmp_path: Path) -> None:
    with stage_model(SOURCE, config=CONFIG) as staged:
        assert folder_bytes(staged.path) == folder_bytes(tmp_path / "model")
        assert staged.report.source == f"hf://org/model@{COMMIT}"
        assert staged.report.verified_by == {"the Hub": 6}
        assert staged.report.skipped == ["modeling_x.py"]
        assert not list(staged.path.glob(".hub*"))
    before = len(hub.requests)
    with stage_model(SOURCE, config=CONFIG) as again:
        assert again.report.outcome == "hit"
    assert len(hub.requests) == before, "the second stage asks the Hub nothing"


@pytest.mark.timing
def test_the_second_stage_of_a_repo_takes_no_time(hub: FakeHub) -> None:
    stage_model(SOURCE, config=CONFIG).close()
    with stage_model(SOURCE, config=CONFIG) as again:
        assert again.report.outcome == "hit"
        assert again.report.seconds < 0.2


def look(folder: Path) -> Peeked:
    folder.mkdir(exist_ok=True)
    seen = peek_model(SOURCE, folder, config=CONFIG, spans=sample_spans)
    assert seen is not None
    return seen


def test_a_look_moves_no_weights_and_tells_the_same_id_as_the_whole_model(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.files["model-00002-of-00002.safetensors"] = safetensors_bytes(9_000_000, name="w1")
    seen = look(tmp_path / "seen")
    assert seen.uri == f"hf://org/model@{COMMIT}"
    assert not list((tmp_path / "seen").rglob("*.safetensors"))
    found = check_sampled_folder(tmp_path / "seen", (WeightSample(*file) for file in seen.files))
    with stage_model(seen.uri, config=CONFIG) as staged:
        assert check_model_folder(staged.path).content_id == found.content_id
    assert hub.count("GET /org/model/resolve") < 2 * (NUM_BLOCKS + 1) + 4 + 6


STAGE = "import sys; from storage.staging import stage_model; from storage.object_store import StorageConfig; print(stage_model(sys.argv[1], config=StorageConfig()).report.outcome)"


def test_a_run_names_the_commit_it_was_planned_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("NIGHTJAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "")
    with FakeHub(folder_bytes(MODELS / "tiny-a")) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        table = CASES / "A1-left-pad" / "input.parquet"
        done = Nightjar(tmp_path, capsys).run("none", table, model__source=SOURCE)
    assert done.code == 0, done.err
    assert done.run is not None
    record = json.loads((done.run / "run.json").read_text())
    assert record["job"]["model"]["source"] == f"hf://org/model@{COMMIT}"


def test_many_processes_in_a_storm_of_429_resolve_once_and_download_once(hub: FakeHub) -> None:
    hub.refusals, hub.retry_after = 3, "1"
    began = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, "-c", STAGE, SOURCE], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outcomes = [process.communicate(timeout=100)[0].strip() for process in processes]
    assert sorted(outcomes) == ["hit", "hit", "hit", "staged"]
    assert hub.count(f"GET {RESOLVE}") == 3 + 1, "one process asks, as often as it was refused"
    assert time.monotonic() - began > 3, "Retry-After is honoured"
    for name in hub.files:
        if name != "modeling_x.py":
            assert hub.count(f"GET /org/model/resolve/{COMMIT}/{name}") == 1


def test_whoever_waited_for_a_failed_resolve_does_not_ask_again(
    hub: FakeHub, quick: None, tmp_path: Path
) -> None:
    hub.refusals, hub.retry_after = 1000, "1"
    processes = [
        subprocess.Popen([sys.executable, "-c", STAGE, SOURCE], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert all("StoreUnavailable" in error and "429" in error for error in errors)
    assert hub.count(RESOLVE) == 6
    hub.refusals = 0
    assert look(tmp_path / "seen").uri.endswith(COMMIT), "a failure is not remembered"


def test_refused_file_requests_are_repeated(hub: FakeHub, quick: None, tmp_path: Path) -> None:
    look(tmp_path / "seen")
    hub.refusals = 4
    with stage_model(SOURCE, config=CONFIG) as staged:
        assert folder_bytes(staged.path) == folder_bytes(tmp_path / "model")


def test_a_file_with_other_bytes_of_the_same_size_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    name = "model-00002-of-00002.safetensors"
    right = hub.files[name]
    hub.spoiled[name] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(CorruptObject, match=rf"{name}.*the Hub promises"):
        stage_model(SOURCE, config=CONFIG)
    assert not list((tmp_path / "cache").rglob("MANIFEST.json"))
    hub.spoiled.clear()
    before = hub.count("GET /org/model/resolve")
    with stage_model(SOURCE, config=CONFIG) as staged:
        assert folder_bytes(staged.path) == folder_bytes(tmp_path / "model")
    assert hub.count("GET /org/model/resolve") == before + 1, "only the damaged file came again"


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cache on a disk of its own, of 128 KiB or as many as the test asks for."""
    with small_disk(tmp_path / "small", getattr(request, "param", 128)) as found:
        if found is None:
            pytest.skip("mounting a small tmpfs needs root")
        yield found / "cache"


NO_ROOM = r"small.*: \d+ bytes needed, \d+ free; make room"


def test_a_disk_that_lacks_room_for_what_the_hub_lists_is_refused_before_a_byte_moves(
    hub: FakeHub, disk: Path
) -> None:
    hub.files["model-00002-of-00002.safetensors"] = safetensors_bytes(140_000, name="w1")
    with pytest.raises(NoSpace, match=NO_ROOM):
        stage_model(SOURCE, config=CONFIG, stage_to=str(disk))
    assert hub.count("/resolve/") == 0
    assert not list(disk.rglob("*.safetensors*"))


def test_what_an_earlier_try_left_there_needs_no_room_again(hub: FakeHub, disk: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    hub.files[first] = safetensors_bytes(60_000, name="w0")
    right = hub.files[second]
    hub.spoiled[second] = bytes(len(right))
    with pytest.raises(CorruptObject):
        stage_model(SOURCE, config=CONFIG, stage_to=str(disk))
    assert len(list(disk.rglob(first))) == 1
    before = hub.count(f"/{first}")
    assert free_bytes(disk) < sum(map(len, hub.files.values())), "else this proves nothing"
    hub.spoiled.clear()
    with stage_model(SOURCE, config=CONFIG, stage_to=str(disk)) as staged:
        assert (staged.path / second).read_bytes() == right
    assert hub.count(f"/{first}") == before


@pytest.mark.filterwarnings("ignore:Not enough free disk space:UserWarning")  # huggingface_hub's
@pytest.mark.parametrize("way", ["http", "xet"])
def test_a_disk_that_fills_up_in_the_middle_is_said_and_nothing_on_it_is_taken_as_whole(
    hub: FakeHub, disk: Path, tmp_path: Path, way: str
) -> None:
    hub.files["model-00002-of-00002.safetensors"] = safetensors_bytes(60_000, name="w1")
    if way == "xet":
        hub.store_in_xet(tmp_path / "xet")
    told: list[str] = []

    def fill(path: Path) -> None:
        """As another user of the disk would: after the small files, before the weights."""
        told.append(path.name)
        with suppress(OSError), (disk.parent / "full").open("ab", buffering=0) as other:
            while len(told) == 4:
                other.write(bytes(4096))

    with pytest.raises(NoSpace, match=NO_ROOM):
        stage_model(SOURCE, config=CONFIG, stage_to=str(disk), on_file=fill)
    assert hub.count("HEAD /org/model/resolve") > 4, "the weights were under way"
    assert not list(disk.rglob("MANIFEST.json"))
    assert "model-00002-of-00002.safetensors" not in told
    (disk.parent / "full").unlink()
    with stage_model(SOURCE, config=CONFIG, stage_to=str(disk)) as staged:
        assert staged.report.outcome == "staged"
        for name, data in folder_bytes(staged.path).items():
            assert data == hub.files[name]
    assert (hub.count(f"GET /org/model/resolve/{COMMIT}/model-00002") == 0) == (way == "xet")


@pytest.mark.filterwarnings("ignore:Not enough free disk space:UserWarning")  # huggingface_hub's
@pytest.mark.parametrize("way", ["http", "xet"])
def test_a_disk_that_lacks_room_for_an_input_of_the_hub_is_said_by_name(
    hub: FakeHub, disk: Path, tmp_path: Path, way: str
) -> None:
    hub.files["rows.parquet"] = bytes(range(256)) * 1000
    if way == "xet":
        hub.store_in_xet(tmp_path / "xet")
    inputs = HubInputs(disk, api=HfApi(endpoint=hub.endpoint))
    uri = f"hf://datasets/org/model@{COMMIT}/rows.parquet"
    with pytest.raises(NoSpace, match=rf"{uri}: does not fit {disk}, \d+ bytes free; make room"):
        inputs.fetch(uri)
    (tmp_path / "other").mkdir()
    inputs = HubInputs(tmp_path / "other", api=HfApi(endpoint=hub.endpoint))
    assert inputs.fetch(uri).read_bytes() == hub.files["rows.parquet"]


def test_a_xet_store_that_does_not_give_a_file_is_asked_again_and_named(
    hub: FakeHub, quick: None, tmp_path: Path
) -> None:
    hub.store_in_xet(tmp_path / "xet")
    hub.xet_store = f"local://{tmp_path / 'empty'}"
    with pytest.raises(StoreUnavailable, match=r"safetensors: RuntimeError.*asked 6 times"):
        stage_model(SOURCE, config=CONFIG)
    assert not list((tmp_path / "cache").rglob("MANIFEST.json"))


def test_a_xet_store_that_cannot_be_reached_is_given_up_soon(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.store_in_xet(tmp_path / "xet")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        hub.xet_store = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(hub_requests, "_MAX_ATTEMPTS", 1)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="error sending request"):
        stage_model(SOURCE, config=CONFIG)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("disk", [30 << 10], indirect=True)
def test_what_a_killed_download_left_behind_is_removed_before_room_is_asked_for(
    hub: FakeHub, disk: Path
) -> None:
    name = "model-00002-of-00002.safetensors"
    hub.files[name] = safetensors_bytes(24 << 20, name="w1")
    hub.stalled.add(name)
    stage = f"from storage.staging import stage_model; from storage.object_store import StorageConfig; stage_model({SOURCE!r}, config=StorageConfig(), stage_to={str(disk)!r})"
    process = subprocess.Popen([sys.executable, "-c", stage])
    try:
        # huggingface_hub writes ten million bytes at a time.
        while used_bytes(disk) < 8 << 20:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert free_bytes(disk) < len(hub.files[name]), "else this proves nothing"
    hub.stalled.clear()
    with stage_model(SOURCE, config=CONFIG, stage_to=str(disk)) as staged:
        assert (staged.path / name).read_bytes() == hub.files[name]


@pytest.mark.parametrize("source", ["hf://org/other", "hf://org/other@v1"])
def test_a_repo_that_is_not_there_is_refused_at_once(hub: FakeHub, source: str) -> None:
    with pytest.raises((NotFound, AccessDenied), match=source) as caught:
        stage_model(source, config=CONFIG)
    assert "\n" not in str(caught.value)
    assert len(hub.requests) == 1


def test_a_hub_that_is_down_is_passing_and_named(
    hub: FakeHub, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable, match="hf://org/model@main"):
        stage_model(SOURCE, config=CONFIG)


def test_a_branch_is_looked_up_again_after_a_while_and_a_commit_never(
    hub: FakeHub, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for revision, expected in (("main", 2), (COMMIT, 1)):
        pins = tmp_path / ("a" if revision == "main" else "b")
        hub.requests.clear()
        hub_source.open_hub(f"hf://org/model@{revision}", pins, ttl_s=0.05)
        hub_source.open_hub(f"hf://org/model@{revision}", pins, ttl_s=100)
        time.sleep(0.06)
        hub_source.open_hub(f"hf://org/model@{revision}", pins, ttl_s=0.05)
        assert hub.count(RESOLVE) == expected
    assert os.listdir(tmp_path / "a")
