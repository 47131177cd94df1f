"""Rows, shards, models and disks that fail: bounded tries, nothing else harmed, and the rest done later."""

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.config import load_job
from inference.backends.dummy import DummyBackend
from inference.backends.dummy_tokenizer import DummyTokenizer
from inference.config import EngineConfig
from inference.errors import EngineFault, ModelError, OutOfMemory
from inference.sequence import Completion, Sequence
from storage import keys
from storage.attempts import attempts_of
from storage.errors import StoreUnavailable
from storage.local_store import LocalStore
from storage.object_store import ObjectInfo
from tasks import claiming, claims
from tasks.drain import DrainReport, drain, new_invocation
from tasks.finish import finish
from tasks.progress import Progress
from tasks.run import Run, prepare
from tasks.shard_work import ShardWork
from tasks.stop import StopSignal
from tasks.verify import verify_run
from tests.pipeline import CASES, MODELS, Finished, Nightjar
from tests.processes import holders

NUM_ROWS, NUM_SHARDS = 24, 6


@pytest.fixture
def nightjar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Nightjar:
    return Nightjar(tmp_path, capsys)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed shards are tried again at once."""
    monkeypatch.setattr(claims, "_BACKOFF_S", 0.01)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.parquet"
    texts = [f"row {row} says hello" for row in range(NUM_ROWS)]
    pq.write_table(pa.table({"id": list(range(NUM_ROWS)), "prompt": texts}), path)
    return path


def job_of(nightjar: Nightjar, uri: Path, **settings: Any) -> Path:
    return nightjar.job(
        "none", uri, engine__backend="dummy", shards__max_rows=NUM_ROWS // NUM_SHARDS, **settings
    )


@pytest.fixture
def run(nightjar: Nightjar, prompts: Path, tmp_path: Path) -> Iterator[Run]:
    run = planned(job_of(nightjar, prompts), tmp_path)
    yield run
    run.close()


def planned(job: Path, tmp_path: Path) -> Run:
    return prepare(load_job(job), work_dir=tmp_path / "work", progress=Progress())


def drained(run: Run, build: Callable[[EngineConfig], Any], **options: Any) -> DrainReport:
    report = drain(
        run,
        invocation=new_invocation(),
        progress=Progress(),
        should_stop=StopSignal(),
        build_backend=build,
        **options,
    )
    finish(run.store, Progress())
    return report


class Faulty(DummyBackend):
    """The dummy engine with rows it cannot do and rows it breaks on."""

    bad_rows: frozenset[int] = frozenset()
    """Rows that become engine errors."""

    breaks_on: frozenset[int] = frozenset()
    """Rows that no engine survives."""

    error: Exception = EngineFault("the engine broke")
    step_s = 0.0
    """Long enough for the next shards to join the first in the engine."""

    num_built = 0

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(dataclasses.replace(config, max_num_seqs=4), step_s=self.step_s)
        type(self).num_built += 1
        self._rows: dict[int, int] = {}

    def submit(self, sequences: Iterable[Sequence]) -> None:
        sequences = list(sequences)
        for sequence in sequences:
            text = DummyTokenizer().decode(list(sequence.prompt_token_ids))
            self._rows[sequence.seq_id] = int(text.split("row ")[1].split()[0])
        super().submit(sequences)

    def step(self) -> list[Completion]:
        running = {self._rows[seq_id] for seq_id in self._seq_ids}
        if running & self.breaks_on:
            raise self.error
        return [self._spoiled(completion) for completion in super().step()]

    def _spoiled(self, completion: Completion) -> Completion:
        if self._rows[completion.seq_id] not in self.bad_rows:
            return completion
        return Completion(
            seq_id=completion.seq_id,
            token_ids=(),
            text="",
            finish_reason="error",
            error="the logits are not finite",
        )


def faulty(**attributes: Any) -> type[Faulty]:
    return type("FaultyHere", (Faulty,), {"num_built": 0, **attributes})


def rows_of(run: Run) -> list[dict[str, Any]]:
    parts = sorted(Path(run.uri).glob("completions/*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def check_whole(run: Run, tmp_path: Path) -> None:
    found = verify_run(run.store, tmp_path)
    assert found.is_whole, found
    assert found.num_rows == NUM_ROWS


def test_a_retry_redoes_failed_rows_only_in_a_new_revision(
    nightjar: Nightjar, run: Run, tmp_path: Path
) -> None:
    drained(run, faulty(bad_rows={2, 3, 9}))
    before = rows_of(run)
    failed = [row["row_index"] for row in before if row["state"] == "engine_error"]
    assert failed == [2, 3, 9]
    assert {row["error"] for row in before if row["error"]} == {"the logits are not finite"}
    done = nightjar.call("retry", run.uri, "--json")
    assert done.code == 0, done.err
    assert done.document["revision"] == 2
    assert done.document["num_failed_rows"] == 0
    for old, new in zip(before, rows_of(run), strict=True):
        if old["row_index"] in failed:
            assert new["state"] in ("ok", "truncated")
            assert (new["attempt"], new["error"]) == (2, None)
            assert new["id"] == old["id"]
        else:
            assert new == old
    revisions = sorted(path.name for path in Path(run.uri).glob("commits/*.r2.json"))
    assert revisions == ["00000.r2.json", "00002.r2.json"]
    assert (Path(run.uri) / "manifest.r2.json").exists()
    check_whole(run, tmp_path)
    same = nightjar.call("retry", run.uri, "--json")
    assert same.document["revision"] == 2, "nothing was left to redo"


def test_redone_rows_are_those_of_a_run_without_faults(
    nightjar: Nightjar, run: Run, prompts: Path
) -> None:
    drained(run, faulty(bad_rows=set(range(0, NUM_ROWS, 2))))
    assert nightjar.call("retry", run.uri).code == 0
    quiet = nightjar.call(
        "run", str(job_of(nightjar, prompts, output__uri=str(nightjar.folder / "quiet"))), "--json"
    )
    wanted = [{**row, "attempt": 0} for row in quiet.rows]
    assert [{**row, "attempt": 0} for row in rows_of(run)] == wanted


def test_a_retry_that_improves_nothing_changes_nothing(run: Run, tmp_path: Path) -> None:
    engine = faulty(bad_rows={2, 3})
    drained(run, engine)
    before = {path: path.read_bytes() for path in Path(run.uri).glob("completions/*")}
    report = drained(run, engine, failed_rows=True)
    assert report.outcomes == {"unchanged": 1}
    assert {path: path.read_bytes() for path in Path(run.uri).glob("completions/*")} == before
    assert not list(Path(run.uri).glob("**/*.r2.json"))
    check_whole(run, tmp_path)


def test_a_shard_that_breaks_the_engine_is_given_up_and_harms_no_other(
    nightjar: Nightjar, run: Run, tmp_path: Path
) -> None:
    # So few tries that a shard must not be caught twice in the company of one that breaks the engine.
    run.job = dataclasses.replace(
        run.job, shards=dataclasses.replace(run.job.shards, max_attempts=2)
    )
    engine = faulty(breaks_on={5, 14}, step_s=0.02)
    report = drained(run, engine)
    assert report.exhausted == {1: "the engine broke", 3: "the engine broke"}
    assert sorted(run.commits()) == [0, 2, 4, 5]
    for shard_id in (1, 3):
        attempts = attempts_of(run.store, shard_id)
        assert len(attempts) == run.job.shards.max_attempts
        assert all(attempt.failure and attempt.failure.retryable for attempt in attempts)
    status = nightjar.call("status", run.uri, "--json")
    assert status.code == 3
    assert status.document["failed_shards"] == {
        "00001": "EngineFault: the engine broke",
        "00003": "EngineFault: the engine broke",
    }
    before = {path: path.read_bytes() for path in Path(run.uri).glob("completions/*")}
    assert nightjar.call("retry", run.uri).code == 0
    check_whole(run, tmp_path)
    for path, data in before.items():
        assert path.read_bytes() == data, "a finished shard was done again"


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError])
def test_an_engine_that_breaks_in_a_way_nobody_announced_costs_its_shard_and_no_other(
    nightjar: Nightjar, run: Run, tmp_path: Path, kind: type[Exception]
) -> None:
    run.job = dataclasses.replace(
        run.job, shards=dataclasses.replace(run.job.shards, max_attempts=2)
    )
    error = kind("row 5 says hello")
    report = drained(run, faulty(breaks_on={5}, error=error, step_s=0.02))
    assert sorted(run.commits()) == [0, 2, 3, 4, 5]
    assert report.exhausted.keys() == {1}
    last = [attempt.failure for attempt in attempts_of(run.store, 1)][-1]
    assert last is not None
    assert (last.error, last.retryable) == ("EngineFault", True)
    assert f"{kind.__name__} at test_failing_shards.py" in last.message
    assert "hello" not in last.message, "an error may quote a row"
    assert nightjar.call("retry", run.uri).code == 0
    check_whole(run, tmp_path)


def test_an_engine_that_cannot_be_built_in_a_way_nobody_announced_is_tried_again(
    run: Run, tmp_path: Path
) -> None:
    builds: list[int] = []

    def build(config: EngineConfig) -> DummyBackend:
        builds.append(len(builds))
        if len(builds) < 2:
            raise ValueError("of a library")
        return DummyBackend(config)

    assert drained(run, build).exhausted == {}
    assert len(builds) == 2
    check_whole(run, tmp_path)


@pytest.mark.parametrize("place", ["read", "accept", "write"])
def test_a_fault_of_our_own_at_one_shard_costs_that_shard_an_attempt(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    works = getattr(ShardWork, place)

    def fail_once(work: ShardWork, *args: Any) -> Any:
        if (work.shard.shard_id, work.attempt) == (2, 1):
            raise KeyError("row 9 says hello")
        return works(work, *args)

    monkeypatch.setattr(ShardWork, place, fail_once)
    assert drained(run, faulty(step_s=0.002)).exhausted == {}
    first = attempts_of(run.store, 2)[0].failure
    assert first is not None
    assert (first.error, first.retryable) == ("ShardFault", True)
    assert first.message.startswith("KeyError at test_failing_shards.py")
    assert "hello" not in first.message
    check_whole(run, tmp_path)


def test_an_engine_out_of_memory_once_costs_one_attempt_and_is_built_anew(
    run: Run, tmp_path: Path
) -> None:
    class Once(faulty()):  # type: ignore[misc]
        def step(self) -> list[Completion]:
            if self.num_built == 1:
                raise OutOfMemory("the device is full")
            return super().step()

    report = drained(run, Once)
    assert report.exhausted == {}
    assert report.outcomes["committed"] == NUM_SHARDS
    assert Once.num_built == 2
    check_whole(run, tmp_path)


def test_an_engine_that_cannot_be_built_now_is_tried_again(run: Run, tmp_path: Path) -> None:
    builds: list[int] = []

    def build(config: EngineConfig) -> DummyBackend:
        builds.append(len(builds))
        if len(builds) < 3:
            raise OutOfMemory("another process has the device")
        return DummyBackend(config)

    assert drained(run, build).exhausted == {}
    assert len(builds) == 3
    check_whole(run, tmp_path)


class Away(LocalStore):
    """A folder that cannot be reached for a number of requests about leases."""

    num_refusals = 0

    def head(self, key: str) -> ObjectInfo:
        if key.startswith(keys.LEASES) and self.num_refusals:
            self.num_refusals -= 1
            raise StoreUnavailable(f"HEAD {key}: is the store up and reachable?")
        return super().head(key)


def test_a_store_that_stays_away_is_waited_for_with_the_engine_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_OUTAGE_PAUSE_S", 0.02)
    store = Away(run.uri)
    run.store = store
    engine = faulty()

    class Leaving(engine):  # type: ignore[misc, valid-type]
        def step(self) -> list[Completion]:
            if not self.stats.num_steps:
                store.num_refusals = 20
            return super().step()

    report = drained(run, Leaving)
    assert store.num_refusals == 0
    assert report.outcomes == {"committed": NUM_SHARDS}
    assert Leaving.num_built == 1
    check_whole(run, tmp_path)


def test_a_store_that_stays_away_too_long_ends_the_drain_with_its_leases_let_go(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "_OUTAGE_PAUSE_S", 0.02)
    monkeypatch.setattr(claiming, "_OUTAGE_S", 0.1)
    run.store = Away(run.uri)
    run.store.num_refusals = 1 << 30
    with pytest.raises(StoreUnavailable, match="is the store up"):
        drained(run, faulty())
    assert holders(LocalStore(run.uri)) == []


def test_a_model_that_cannot_be_loaded_stops_once_before_any_shard(run: Run) -> None:
    builds: list[int] = []

    def build(config: EngineConfig) -> DummyBackend:
        builds.append(1)
        raise ModelError("model.safetensors: lm_head.weight is missing; restore the file")

    with pytest.raises(ModelError, match="lm_head"):
        drained(run, build)
    assert len(builds) == 1
    assert run.commits() == {}
    assert holders(run.store) == []


def test_a_damaged_model_ends_the_command_with_two_and_one_line(
    nightjar: Nightjar, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODELS / "tiny-a", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 7}))
    done = nightjar.run(str(model), CASES / "A1-left-pad" / "input.parquet", shards__max_rows=4)
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert sum(line.startswith("nightjar run:") for line in done.err.splitlines()) == 1
    assert len(list(tmp_path.glob("out/*/_attempts/*/*/failed.json"))) <= 1


@pytest.mark.parametrize("change", ["changed", "removed"])
def test_an_input_changed_after_planning_costs_its_own_shards_only(
    nightjar: Nightjar, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    for part in range(4):
        rows = {"id": [f"{part}-{row}" for row in range(6)], "prompt": [f"p{part}"] * 6}
        pq.write_table(pa.table(rows), folder / f"part-{part}.parquet")
    job = nightjar.job("none", folder, engine__backend="dummy", shards__max_rows=6)
    run = planned(job, tmp_path)
    run.close()
    victim = folder / "part-2.parquet"
    original = victim.read_bytes()
    if change == "removed":
        victim.unlink()
    else:
        pq.write_table(pa.table({"id": ["x"] * 6, "prompt": ["other"] * 6}), victim)
    done = nightjar.call("drain", run.uri, "--json")
    assert done.code == 3
    assert list(done.document["failed_shards"]) == ["2"]
    assert sorted(run.commits()) == [0, 1, 3]
    status = nightjar.call("status", run.uri, "--json")
    assert status.code == 3
    (said,) = status.document["failed_shards"].values()
    assert said.startswith("InputChanged: ")
    assert "part-2.parquet" in said
    assert "ETag was sha256:" in said
    assert len(attempts_of(run.store, 2)) == 1, "trying again could not have helped"
    victim.write_bytes(original)
    again = nightjar.call("run", str(job), "--json")
    assert again.code == 0
    assert again.run == Path(run.uri)
    assert [len(attempts_of(run.store, shard_id)) for shard_id in range(4)] == [1, 1, 2, 1]
    assert verify_run(run.store, tmp_path).is_whole


@pytest.mark.parametrize(("allowed", "code"), [(1, 5), (2, 0), (None, 0)])
def test_more_failed_rows_than_allowed_end_with_five_and_are_published(
    nightjar: Nightjar, tmp_path: Path, allowed: int | None, code: int
) -> None:
    path = tmp_path / "some.parquet"
    pq.write_table(pa.table({"prompt": ["fine", None, "also", None]}), path)
    done = nightjar.call(
        "run",
        str(nightjar.job("none", path, engine__backend="dummy", max_failed_rows=allowed)),
        "--json",
    )
    assert done.code == code
    assert done.document["is_published"]
    assert done.document["num_failed_rows"] == 2
    assert ("2 rows failed, max_failed_rows allows 1" in done.err) == (code == 5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def bulky(tmp_path: Path) -> Path:
    """Rows that take 2 MB, and 1 MB packed."""
    path = tmp_path / "bulky.parquet"
    notes = [os.urandom(25_000).hex() for _ in range(40)]
    pq.write_table(pa.table({"prompt": ["say"] * 40, "note": notes}), path)
    return path


def one_line(done: Finished, folder: Path) -> str:
    assert "Traceback" not in done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("nightjar run:")]
    assert str(folder) in line
    assert "needed" in line
    assert "free" in line
    return line


def test_a_full_scratch_disk_is_said_in_one_line(
    nightjar: Nightjar, bulky: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = nightjar.job("none", bulky, engine__backend="dummy")
    monkeypatch.setenv("NIGHTJAR_WORK_DIR", str(small_disk))
    done = nightjar.call("run", str(job), "--json")
    assert done.code == 2
    one_line(done, small_disk)
    assert list(small_disk.iterdir()) == []
    monkeypatch.delenv("NIGHTJAR_WORK_DIR")
    assert nightjar.call("run", str(job)).code == 0


def test_a_full_output_disk_keeps_what_is_committed_and_is_taken_up_again(
    nightjar: Nightjar, bulky: Path, small_disk: Path, tmp_path: Path
) -> None:
    settings = {"engine__backend": "dummy", "shards__max_rows": 5}
    job = nightjar.job("none", bulky, output__uri=str(small_disk), **settings)
    done = nightjar.call("run", str(job), "--json")
    assert done.code == 3, "something is committed"
    one_line(done, small_disk)
    (folder,) = (path.parent for path in small_disk.glob("*/run.json"))
    num_committed = len(list(folder.glob("commits/*.json")))
    assert 0 < num_committed < 8
    parts = list(folder.glob("_attempts/*/*/completions.parquet"))
    assert len(parts) == num_committed, "what cannot be committed does not fill the disk further"
    assert nightjar.call("verify", str(folder)).code == 3
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert nightjar.call("run", str(job), "--json").code == 0
    assert nightjar.call("verify", str(folder)).code == 0
