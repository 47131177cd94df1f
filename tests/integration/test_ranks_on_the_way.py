"""Two ranks that load while the model is still being staged: real processes, a real store, real faults."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.config import load_job
from inference.arriving import Arriving
from inference.backends.paged import PagedBackend
from inference.backends.ranked import RankedBackend
from inference.config import EngineConfig
from inference.sampling import SamplingParams
from inference.sequence import Sequence
from storage.errors import CorruptObject
from tasks.model import begin_model
from tasks.progress import Progress
from tests.faults.fault_proxy import FOREVER, FaultProxy
from tests.pipeline import CASES, MODELS, Nightjar
from tests.processes import REPOSITORY, children, is_alive, wait_for
from tests.seaweed import Seaweed, put_model

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: tensor parallel needs it")

SHARDED = MODELS / "tiny-tied-sharded"
FIRST, SECOND, LAST = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
PATIENCE_S = 240.0


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[tuple[str, str]]]:
    """Return (rank, file name) of every weight file, whole or partial, that a rank has opened so far."""
    log = tmp_path / "opened"
    monkeypatch.setenv("NIGHTJAR_TEST_OPENED", str(log))

    def read() -> set[tuple[str, str]]:
        lines = log.read_text().splitlines() if log.exists() else []
        return {(rank, name) for rank, name in (line.split() for line in lines)}

    return read


def config(folder: Path, size: int) -> EngineConfig:
    return EngineConfig(
        model=str(folder), backend="paged", dtype="float32", tensor_parallel_size=size
    )


def build(files: Arriving, found: list[Any]) -> threading.Thread:
    def work() -> None:
        try:
            settings = config(files.folder(), 2)
            found.append(RankedBackend(settings, arriving=files, module="tests.watching_rank"))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def tokens(backend: Any) -> dict[int, tuple[int, ...]]:
    sampling = SamplingParams(max_tokens=8, temperature=0.8)
    backend.submit(Sequence(i, [5, 6, 7 + i], sampling, draw_seed=i) for i in range(4))
    found = {}
    while backend.num_unfinished:
        found.update({c.seq_id: c.token_ids for c in backend.step()})
    return found


def of_both(*names: str) -> set[tuple[str, str]]:
    return {(rank, name) for rank in "01" for name in names}


def test_ranks_read_each_file_once_it_is_whole_and_give_the_tokens_of_the_whole_folder(
    tmp_path, opened
):
    folder = shutil.copytree(SHARDED, tmp_path / "model")
    # There under its own name and as long as it should be, but nobody has vouched for it.
    unverified = bytearray((SHARDED / LAST).read_bytes())
    unverified[-2000:] = bytes(2000)
    (folder / LAST).write_bytes(unverified)
    files = Arriving()
    found: list[Any] = []
    thread = build(files, found)
    files.begin(folder)
    files.add(folder / SECOND)
    files.add(folder / FIRST)
    wait_for(
        lambda: found or opened() == of_both(FIRST, SECOND),
        timeout_s=PATIENCE_S,
        what="ranks to read what is there",
    )
    assert not found, found
    (folder / "other").write_bytes((SHARDED / LAST).read_bytes())
    (folder / "other").rename(folder / LAST)
    files.add(folder / LAST)
    thread.join(PATIENCE_S)
    backend = found[0]
    try:
        assert opened() == of_both(FIRST, SECOND, LAST)
        assert files.waited_s > 0, "the ranks' wait is the replica's"
        alone = PagedBackend(config(SHARDED, 1))
        assert tokens(backend) == tokens(alone)
        alone.close()
    finally:
        backend.close()


def test_a_file_damaged_on_its_way_is_read_by_no_rank_and_its_fault_ends_them(
    tmp_path, capsys, monkeypatch, caplog, seaweed: Seaweed, opened
):
    monkeypatch.setenv("NIGHTJAR_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, logger="inference.rank_group")
    with FaultProxy(seaweed.port) as proxy:
        late = proxy.add("stall", f"^GET .*{LAST}", count=FOREVER, seconds=4, kept=0.0)
        job = Nightjar(tmp_path, capsys).job(
            "none",
            CASES / "A1-left-pad" / "input.parquet",
            model__source=put_model(seaweed, SHARDED),
            storage__endpoint_url=proxy.endpoint_url,
            engine__backend="paged",
            engine__tensor_parallel_size=2,
        )
        model = begin_model(load_job(job), progress=Progress())
        files = model.files()
        assert files is not None
        found: list[Any] = []
        thread = build(files, found)
        wait_for(
            lambda: found or opened() >= of_both(FIRST, SECOND),
            timeout_s=PATIENCE_S,
            what="ranks to read what is there",
        )
        ranks = children(os.getpid(), "-m tests.watching_rank")
        assert not found, found
        proxy.add("flip", f"^GET .*{LAST}")
        late.count = 0
        thread.join(PATIENCE_S)
        model.close()
    assert isinstance(found[0], CorruptObject)
    assert LAST in str(found[0])
    assert opened() == of_both(FIRST, SECOND)
    assert not list((tmp_path / "cache").rglob("MANIFEST.json"))
    assert len(ranks) >= 2
    wait_for(lambda: not any(map(is_alive, ranks)), what="the ranks to end")
    endings = [message for message in caplog.messages if "ended with exit code 9" in message]
    assert len(endings) == 2, caplog.messages
    assert all("no longer on their way: CorruptObject" in ending for ending in endings)


def test_ranks_that_wait_for_weights_end_with_the_process_that_stages_them(opened):
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.waiting_owner", str(SHARDED), FIRST], cwd=REPOSITORY
    )
    try:
        wait_for(lambda: opened() == of_both(FIRST), timeout_s=PATIENCE_S, what="a file to be read")
        ranks = children(owner.pid, "-m tests.watching_rank")
        assert len(ranks) >= 2
    finally:
        owner.kill()
        owner.wait()
    wait_for(lambda: not any(map(is_alive, ranks)), what="the ranks to end")
