"""How the ends of a run show in Prefect: a state and one line, the same ends as the exit codes."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.config import load_job
from flows.task_runs import as_state, drained_state, ended_state
from storage.errors import StoreUnavailable
from tasks.drain import DrainReport, drain, new_invocation
from tasks.finish import finish
from tasks.orchestrate import Ended
from tasks.progress import Progress
from tasks.run import Run, prepare
from tasks.stop import Stopped, StopSignal


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    pq.write_table(pa.table({"prompt": ["one", None, "three"]}), tmp_path / "in.parquet")
    job = {
        "model": {"source": "none"},
        "input": {"uri": str(tmp_path / "in.parquet"), "prompt_column": "prompt"},
        "output": {"uri": str(tmp_path / "out")},
        "shards": {"max_rows": 1},
        "engine": {"backend": "dummy"},
    }
    (tmp_path / "work").mkdir()
    run = prepare(load_job(job), work_dir=tmp_path / "work", progress=Progress())
    yield run
    run.close()


def ended(run: Run, **changes: object) -> Ended:
    """The end of a run as its store has it now."""
    manifest = finish(run.store, Progress())
    values = {"job": run.job, "store": run.store, "exhausted": {}, "manifest": manifest, **changes}
    return Ended(**values)  # type: ignore[arg-type]


def drained(run: Run) -> None:
    drain(run, invocation=new_invocation(), progress=Progress(), should_stop=StopSignal())


def test_hooks_find_our_rooms_though_prefect_runs_them_from_a_folder_with_a_storage_module() -> (
    None
):
    probe = (
        "import sys, pathlib, prefect.runner; "
        "sys.path.insert(0, str(pathlib.Path(prefect.runner.__file__).parent)); "
        "import flows.batch_generate, storage; print(storage.__file__)"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", probe],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd="/",
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert Path(found.splitlines()[-1]).parent == root / "storage"


def test_a_published_run_is_completed(run: Run) -> None:
    drained(run)
    state = ended_state(ended(run))
    assert state.is_completed()
    assert "published, 3 rows:" in state.message
    assert "1 invalid_input" in state.message


def test_a_partial_run_is_failed_and_names_its_first_lost_shard(run: Run) -> None:
    state = ended_state(ended(run, exhausted={1: "OutOfMemory: no room for 3 blocks"}))
    assert state.is_failed()
    assert "3 of 3 shards could not be finished (shard 00001: OutOfMemory" in state.message
    assert "run the same again to go on" in state.message


def test_a_published_run_with_more_failed_rows_than_allowed_is_failed(run: Run) -> None:
    drained(run)
    strict = dataclasses.replace(run.job, max_failed_rows=0)
    state = ended_state(ended(run, job=strict))
    assert state.is_failed()
    assert state.message.endswith("1 rows failed, max_failed_rows allows 0")
    assert ended_state(
        ended(run, job=dataclasses.replace(run.job, max_failed_rows=1))
    ).is_completed()


def test_a_cancelled_start_is_cancelled_unless_it_published(run: Run) -> None:
    assert ended_state(ended(run, is_cancelled=True)).is_cancelled()
    drained(run)
    assert ended_state(ended(run, is_cancelled=True)).is_completed()


def test_a_replica_that_gave_shards_up_is_failed_by_the_first_of_them() -> None:
    report = DrainReport(exhausted={7: "EngineFault: broke", 3: "OutOfMemory: full"})
    state = drained_state(report)
    assert state.is_failed()
    assert "2 given up, first 00003: OutOfMemory: full" in state.message


def raising(error: Exception) -> object:
    def work() -> None:
        raise error

    return as_state(work, lambda _: pytest.fail("it raised"))


def test_a_stop_is_a_cancellation_and_a_fault_of_the_user_s_is_one_line() -> None:
    assert raising(Stopped()).is_cancelled()  # type: ignore[attr-defined]
    state = raising(StoreUnavailable("the store is down; is it up?"))
    assert state.is_failed()  # type: ignore[attr-defined]
    assert state.message == "the store is down; is it up?"  # type: ignore[attr-defined]
