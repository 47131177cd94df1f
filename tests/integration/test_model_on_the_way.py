"""Planning without weights, and engines that load while weights arrive: a real store, a real engine."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.config import load_job
from inference.backends import create_backend
from inference.config import EngineConfig
from inference.content_id import NUM_BLOCKS
from inference.errors import ModelError
from inference.sampling import SamplingParams
from inference.sequence import Sequence
from inference.weights import check_model_folder
from storage.errors import AccessDenied, CorruptObject
from storage.s3_client import make_client
from tasks.job import RunConfig
from tasks.model import RunModel, begin_model, peek_model
from tasks.progress import Progress
from tests.faults.fault_proxy import FOREVER, FaultProxy
from tests.model_files import write_model
from tests.pipeline import CASES, MODELS, Nightjar
from tests.seaweed import Seaweed, put_model

SHARDED = MODELS / "tiny-tied-sharded"
LAST = "model-00003-of-00003.safetensors"


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.port) as proxy:
        yield proxy


@pytest.fixture
def nightjar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Nightjar:
    monkeypatch.setenv("NIGHTJAR_CACHE", str(tmp_path / "cache"))
    return Nightjar(tmp_path, capsys)


def job_of(nightjar: Nightjar, proxy: FaultProxy, source: str, **settings: Any) -> RunConfig:
    path = nightjar.job(
        "none",
        CASES / "A1-left-pad" / "input.parquet",
        model__source=source,
        storage__endpoint_url=proxy.endpoint_url,
        **settings,
    )
    return load_job(path)


class Opened:
    """Files that the loader's thread opens, in order."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.has_some = threading.Event()
        self.is_watching = True

    def see(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and self.is_watching and isinstance(args[0], str | Path):
            path = Path(args[0])
            is_loader = threading.current_thread().name == "nightjar-weights"
            if is_loader and path.name.endswith((".safetensors", ".partial", ".journal")):
                self.paths.append(path)
                self.has_some.set()


@contextmanager
def watching() -> Iterator[Opened]:
    """An audit hook stays for good, so it is told to look away."""
    opened = Opened()
    sys.addaudithook(opened.see)
    try:
        yield opened
    finally:
        opened.is_watching = False


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """An engine's libraries: on a busy machine they take longer to import than a store is waited for."""
    config = EngineConfig(model=str(SHARDED), backend="paged", dtype="float32", max_num_seqs=1)
    create_backend(config).close()


def build(model: RunModel, found: list[Any]) -> threading.Thread:
    def work() -> None:
        try:
            files = model.files()
            assert files is not None, "it was there already"
            config = EngineConfig(model=str(files.folder()), backend="paged", dtype="float32")
            found.append(create_backend(config, arriving=files))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def tokens(backend: Any) -> list[int]:
    backend.submit([Sequence(0, [5, 6, 7], SamplingParams(max_tokens=6, temperature=0.0))])
    while True:
        for completion in backend.step():
            return list(completion.token_ids)


def test_an_engine_loads_the_first_file_while_the_last_one_is_still_staged(
    nightjar: Nightjar, proxy: FaultProxy, seaweed: Seaweed, tmp_path: Path
) -> None:
    source = put_model(seaweed, SHARDED)
    slow = proxy.add("status", rf"^GET .*{LAST}", count=FOREVER)
    found: list[Any] = []
    with watching() as opened:
        model = begin_model(job_of(nightjar, proxy, source), progress=Progress())
        thread = build(model, found)
        assert opened.has_some.wait(120), "nothing is loaded before everything is staged"
        assert not list((tmp_path / "cache").rglob(LAST))
        assert not list((tmp_path / "cache").rglob("MANIFEST.json"))
        assert not found
        slow.count = 0
        thread.join(240)
        model.wait()
    names = list(dict.fromkeys(path.name for path in opened.paths))
    assert names[-1] == LAST
    assert all(path.suffix == ".safetensors" for path in opened.paths), "a partial file was read"
    assert (model.path / "MANIFEST.json").exists()
    assert model.content_id == check_model_folder(SHARDED).content_id
    plain = create_backend(EngineConfig(model=str(SHARDED), backend="paged", dtype="float32"))
    assert tokens(found[0]) == tokens(plain)
    for backend in (found[0], plain):
        backend.close()
    model.close()


def test_a_damaged_file_is_never_loaded_and_its_fault_ends_the_engine(
    nightjar: Nightjar, proxy: FaultProxy, seaweed: Seaweed, tmp_path: Path
) -> None:
    source = put_model(seaweed, SHARDED)
    proxy.add("flip", rf"^GET .*{LAST}")
    found: list[Any] = []
    with watching() as opened:
        model = begin_model(job_of(nightjar, proxy, source), progress=Progress())
        build(model, found).join(240)
        assert isinstance(found[0], CorruptObject)
        assert LAST in str(found[0])
        with pytest.raises(CorruptObject):
            model.wait()
    assert LAST not in [path.name for path in opened.paths]
    assert not list((tmp_path / "cache").rglob("MANIFEST.json"))
    model.close()


def test_staging_that_nobody_waits_for_is_given_up(
    nightjar: Nightjar, proxy: FaultProxy, seaweed: Seaweed, tmp_path: Path
) -> None:
    source = put_model(seaweed, SHARDED)
    slow = proxy.add("stall", rf"^GET .*{LAST}", seconds=0.2)
    model = begin_model(job_of(nightjar, proxy, source), progress=Progress())
    model.close()
    assert slow.count <= 1
    assert not list((tmp_path / "cache").rglob("MANIFEST.json")), "it was staged to the end"


def test_a_look_tells_the_id_of_the_whole_model_and_moves_no_weight_file(
    nightjar: Nightjar, proxy: FaultProxy, seaweed: Seaweed, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "big", num_weight_files=2, weight_bytes=12 << 20)
    whole = check_model_folder(folder).content_id
    (tmp_path / "look").mkdir()
    s3 = job_of(nightjar, proxy, put_model(seaweed, folder), engine__max_model_len=64)
    local = replace(s3, model=replace(s3.model, source=str(folder)))
    copied = replace(local, hardware=replace(local.hardware, stage_to=str(tmp_path / "other")))
    for job in (s3, local, copied):
        model = peek_model(job, work_dir=tmp_path / "look", progress=Progress())
        assert model.content_id == whole
        assert model.num_weight_bytes == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        model.close()
    assert proxy.count(r"^GET .*\.safetensors HTTP") == 2 * (1 + NUM_BLOCKS)
    for cache in ("cache", "other", "look"):
        assert not list((tmp_path / cache).rglob("*.safetensors"))


def test_a_model_in_a_store_is_sized_by_its_config_alone(
    nightjar: Nightjar, proxy: FaultProxy, seaweed: Seaweed
) -> None:
    storage = ("--endpoint-url", proxy.endpoint_url)
    there = nightjar.call("tiers", put_model(seaweed, SHARDED), *storage, "--json")
    assert there.code == 0, there.err
    assert there.out == nightjar.call("tiers", str(SHARDED), "--json").out
    assert proxy.count(r"^GET .*config\.json HTTP") == 1
    assert proxy.count(r"^GET .*\.safetensors HTTP") == 0


def test_a_folder_that_only_the_replicas_have_does_not_stop_planning(
    nightjar: Nightjar, proxy: FaultProxy, seaweed: Seaweed, tmp_path: Path
) -> None:
    job = job_of(nightjar, proxy, put_model(seaweed, SHARDED), hardware__stage_to="/proc/nvme")
    model = peek_model(job, work_dir=tmp_path, progress=Progress())
    assert model.content_id == check_model_folder(SHARDED).content_id
    with pytest.raises(AccessDenied, match="/proc/nvme"):
        begin_model(job, progress=Progress())


def test_a_model_replaced_between_the_look_and_the_engine_is_refused(
    nightjar: Nightjar, proxy: FaultProxy, seaweed: Seaweed, tmp_path: Path
) -> None:
    job = job_of(nightjar, proxy, put_model(seaweed, SHARDED))
    model = peek_model(job, work_dir=tmp_path, progress=Progress())
    config = (SHARDED / "config.json").read_text()
    client = make_client(seaweed.config)
    client.put_object(Bucket=seaweed.bucket, Key="models/m/config.json", Body=f"{config} ".encode())
    client.close()
    found: list[Any] = []
    build(model, found).join(240)
    with pytest.raises(ModelError, match="this run was planned with"):
        model.wait()
    found[0].close()
    model.close()


def test_a_run_has_one_identity_wherever_its_model_lies_and_plans_without_weights(
    nightjar: Nightjar,
    proxy: FaultProxy,
    seaweed: Seaweed,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="nightjar.engine")
    table = CASES / "A1-left-pad" / "input.parquet"
    settings = {"storage__endpoint_url": proxy.endpoint_url}
    remote = {"model__source": put_model(seaweed, SHARDED), "model__dtype": "float32", **settings}
    planned = nightjar.call("plan", str(nightjar.job("none", table, **remote)), "--json")
    assert planned.code == 0, planned.err
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "planning moved weights"
    here = nightjar.run("tiny-tied-sharded", table, **settings)
    away = nightjar.run("none", table, output__uri=str(tmp_path / "away"), **remote)
    assert (here.code, away.code) == (0, 0), here.err + away.err
    assert here.run is not None
    assert away.run is not None
    assert here.run.name == away.run.name, "another place of the model gave another run"
    assert here.by_id() == away.by_id()
    receipt = json.loads(next((away.run / "metrics").iterdir()).read_text())
    assert receipt["seconds"]["stage"] > 0, "the engine's wait for its weights is accounted for"
    assert list((tmp_path / "cache").rglob(LAST)), "the engine's weights were staged"
    (said,) = (text for text in caplog.messages if text.startswith("engine ready"))
    assert "of it waiting for weights; of the" in said
