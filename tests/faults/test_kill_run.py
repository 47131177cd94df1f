"""Whole runs, killed: whatever is left, running again ends with every row once and the same text.

SIGKILL strikes real `nightjar run` processes at random moments, and once between any two durable steps.
What a reader then finds is compared, row by row, with what an undisturbed run wrote.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import keys
from storage.object_store import ObjectStore, StorageConfig, open_store
from tests.processes import Cli, children, cli_in, document, is_alive, kill, results, wait_for
from tests.seaweed import Seaweed

NUM_SHARDS, NUM_ROWS = 12, 240
PUBLISHED = keys.manifest()

# Every moment between two durable steps of a run, in the order in which a run comes by.
STEPS = [
    "local_before_link",
    "after_record",
    "after_plan_table",
    "after_plan",
    "local_after_link",
    "after_lease",
    "after_claim",
    "local_before_rename",
    "after_data",
    "before_commit",
    "after_commit",
    "before_reveal",
    "after_copy",
    "local_after_rename",
    "after_reveal",
    "before_publish",
    "after_publish",
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("input") / "prompts.parquet"
    texts = [f"Tell me {row} things about the moon" for row in range(NUM_ROWS)]
    texts[7] = None  # a bad row is a row of the result too
    pq.write_table(pa.table({"id": list(range(NUM_ROWS)), "prompt": texts}), path)
    return path


@pytest.fixture(scope="module")
def undisturbed(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = tmp_path_factory.mktemp("undisturbed")
    with cli_in(folder) as cli:
        done = cli.call("run", str(job(cli, prompts)), "--json")
        table = results(open_store(document(done)["run"]), folder)
    assert table.column("row_index").to_pylist() == list(range(NUM_ROWS))
    return table


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with cli_in(tmp_path) as cli:
        yield cli


def job(cli: Cli, prompts: Path, **settings: object) -> Path:
    """A run of 12 shards that takes about a second after planning: one sequence at a time, long answers."""
    return cli.job(
        "kill",
        input__uri=str(prompts),
        input__prompt_column="prompt",
        input__id_column="id",
        sampling__max_tokens=400,
        sampling__ignore_eos=True,
        sampling__temperature=0.8,
        shards__max_rows=NUM_ROWS // NUM_SHARDS,
        engine__max_num_seqs=1,
        **settings,
    )


def check_whole(cli: Cli, run: str, undisturbed: pa.Table, *options: str) -> None:
    verified = cli.call("verify", run, "--json", *options)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert document(verified)["num_rows"] == NUM_ROWS
    store = open_store(run, StorageConfig(endpoint_url=options[1] if options else None))
    assert results(store, cli.folder).equals(undisturbed)


def num_files(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def campaign(
    cli: Cli, job: Path, store: ObjectStore | None, rng: random.Random, out: list[str]
) -> int:
    """Kill a run, again and again, until one start reaches its end; return how many were killed.

    Half the kills come after a random time, half as soon as a random number of objects was written.
    """
    num_killed = 0
    while True:
        process = cli.start("run", str(job), "--json", *out)
        if rng.random() < 0.5 or store is None:
            time.sleep(rng.uniform(0.1, 2.0))
        else:
            goal = num_objects(store) + rng.randint(1, 12)
            deadline = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < deadline:
                if num_objects(store) >= goal:
                    break
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.01))
        if not kill(process):
            assert process.returncode == 0
            return num_killed
        num_killed += 1


def num_objects(store: ObjectStore) -> int:
    return sum(1 for _ in store.list())


def test_killed_twenty_times_at_random_every_row_is_there_once(
    cli: Cli, prompts: Path, undisturbed: pa.Table
) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    num_killed = num_runs = 0
    while num_killed < 20:
        num_runs += 1
        out = cli.folder / f"out-{num_runs}"
        path = job(cli, prompts, output__uri=str(out))
        num_killed += campaign(cli, path, open_store(str(out)), rng, [])
        (run,) = (str(found.parent) for found in out.glob("*/run.json"))
        check_whole(cli, run, undisturbed)
    print(f"{num_killed} kills over {num_runs} runs")
