"""Whole runs, killed: whatever is left, running again ends with every row once and the same text.

SIGKILL strikes real `nightjar run` processes at random moments, and once between any two durable steps.
What a reader then finds is compared, row by row, with what an undisturbed run wrote.
"""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import keys
from storage.local_store import LocalStore
from storage.object_store import ObjectStore, open_store
from tasks.verify import verify_run
from tests.processes import Cli, children, cli_in, document, is_alive, kill, results, wait_for
from tests.seaweed import Seaweed

NUM_SHARDS, NUM_ROWS = 12, 240

# Every moment between two durable steps of a run, in the order in which a run comes by.
STEPS = [
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


class Undisturbed(NamedTuple):
    table: pa.Table
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    with cli_in(folder) as cli:
        done = cli.call("run", str(job(cli, prompts)), "--json")
    table = results(open_store(document(done)["run"]), folder)
    assert table.column("row_index").to_pylist() == list(range(NUM_ROWS))
    return Undisturbed(table, time.monotonic() - started)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with cli_in(tmp_path) as cli:
        yield cli


def job(cli: Cli, prompts: Path, *, name: str = "kill", **settings: object) -> Path:
    """A run of 12 shards that takes about a second after planning: one sequence at a time, long answers."""
    return cli.job(
        name,
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


def check_whole(store: ObjectStore, folder: Path, undisturbed: Undisturbed) -> None:
    found = verify_run(store, folder)
    assert found.is_whole, found
    assert found.num_rows == NUM_ROWS
    assert results(store, folder).equals(undisturbed.table)


def campaign(
    cli: Cli, job: Path, store: ObjectStore, rng: random.Random, max_kills: int, usual_s: float
) -> int:
    """Kill a run, again and again, until it ends before the kill or has been killed enough.

    Half the kills come after a random time, half as soon as a random number of objects was written.
    """
    num_killed = 0
    while num_killed < max_kills:
        process = cli.start("run", str(job), "--json")
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0.1, 0.8) * usual_s)
        else:
            goal = num_objects(store) + rng.randint(1, 12)
            while process.poll() is None and num_objects(store) < goal:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.01))
        if not kill(process):
            assert process.returncode == 0
            break
        num_killed += 1
    return num_killed


def num_objects(store: ObjectStore) -> int:
    return sum(1 for _ in store.list())


def run_in(out: Path) -> LocalStore:
    """The only run below a folder."""
    (record,) = out.glob("*/run.json")
    return LocalStore(record.parent)


def test_killed_twenty_times_at_random_every_row_is_there_once(
    cli: Cli, prompts: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)

    def killed_ten_times(lane: int) -> int:
        """As many runs as it takes, each to its end."""
        rng = random.Random(seed + lane)
        num_killed = num_runs = 0
        while num_killed < 10:
            num_runs += 1
            folder = tmp_path / f"{lane}-{num_runs}"
            folder.mkdir()
            path = job(cli, prompts, name=folder.name, output__uri=str(folder))
            num_killed += campaign(
                cli, path, LocalStore(folder), rng, 10 - num_killed, undisturbed.seconds
            )
            assert cli.call("run", str(path)).returncode == 0
            check_whole(run_in(folder), folder, undisturbed)
        return num_runs

    # Two at a time: each is mostly one process that waits for another.
    with ThreadPoolExecutor(2) as lanes:
        print(f"20 kills over {sum(lanes.map(killed_ten_times, range(2)))} runs")


def test_killed_once_at_every_durable_step_every_row_is_there_once(
    cli: Cli, prompts: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    path = job(cli, prompts)
    for number, step in enumerate(STEPS):
        # The local steps are passed all the time: their kills come later than the first pass.
        chance = 0.3 if step.startswith("local") else 1
        killed = cli.call("run", str(path), failpoint=f"{step}:kill:{chance}:{number}")
        assert killed.returncode == -signal.SIGKILL, f"{step} was never passed: {killed.stderr}"
        published = list(tmp_path.glob("out/*/manifest.json"))
        assert bool(published) == (step == "after_publish"), step
    assert cli.call("run", str(path)).returncode == 0
    check_whole(run_in(tmp_path / "out"), tmp_path, undisturbed)


def test_killed_against_a_real_object_store_every_row_is_there_once(
    cli: Cli, prompts: Path, undisturbed: Undisturbed, tmp_path: Path, seaweed: Seaweed
) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    path = job(cli, prompts, output__uri=seaweed.uri, storage__endpoint_url=seaweed.endpoint_url)
    for step in ("after_data", "after_commit", "after_copy"):
        killed = cli.call("run", str(path), failpoint=f"{step}:kill:1:0")
        assert killed.returncode == -signal.SIGKILL, f"{step} was never passed: {killed.stderr}"
    # Then at random, as often as the run has not ended before.
    store = open_store(seaweed.uri, seaweed.config)
    campaign(cli, path, store, random.Random(seed), 3, undisturbed.seconds)
    done = cli.call("run", str(path), "--json")
    assert done.returncode == 0
    check_whole(open_store(document(done)["run"], seaweed.config), tmp_path, undisturbed)


@pytest.mark.parametrize("victim", ["child", "parent"])
def test_one_of_two_replicas_is_killed(
    cli: Cli, prompts: Path, undisturbed: Undisturbed, tmp_path: Path, victim: str
) -> None:
    path = job(cli, prompts, hardware__replicas=2)
    # Slow enough for the second replica to get something: a short sleep at every step.
    run = cli.start("run", str(path), "--json", failpoint=",".join(f"{s}:sleep:1:0" for s in STEPS))
    child = wait_for(lambda: children(run.pid, "flows.cli drain"), what="the second replica")[0]
    store = run_in(tmp_path / "out")
    wait_for(lambda: owners(store) >= {str(run.pid), str(child)}, what="both to hold a shard")
    if victim == "parent":
        kill(run)
        again = cli.start("run", str(path), "--json")  # at once, beside the orphan
        wait_for(lambda: not is_alive(child), what="the orphan to end by itself")
    else:
        os.kill(child, signal.SIGKILL)
        again = run
    assert again.wait(60) == 0
    check_whole(store, tmp_path, undisturbed)


def owners(store: ObjectStore) -> set[str]:
    """Process ids of whoever has claimed an attempt."""
    claims = [info.key for info in store.list(keys.ATTEMPTS) if info.key.endswith("attempt.json")]
    return {json.loads(store.get(claim))["holder"].split("/")[2] for claim in claims}


@pytest.mark.parametrize("moment", ["planning", "generating"])
def test_a_feed_that_is_killed_costs_no_row_and_no_attempt(
    cli: Cli, prompts: Path, undisturbed: Undisturbed, tmp_path: Path, moment: str
) -> None:
    path = job(cli, prompts)
    run = cli.start("run", str(path), "--json")
    if moment == "generating":
        wait_for(lambda: list(tmp_path.glob("out/*/commits/*")), what="the first commit")
    for feed in wait_for(lambda: children(run.pid, "tasks.feed_child"), what="a feed"):
        os.kill(feed, signal.SIGKILL)
    assert run.wait(60) == 0
    store = run_in(tmp_path / "out")
    check_whole(store, tmp_path, undisturbed)
    assert (
        sum(info.key.endswith("attempt.json") for info in store.list(keys.ATTEMPTS)) == NUM_SHARDS
    )


def test_three_starts_at_the_same_time_are_one_run(
    cli: Cli, undisturbed: Undisturbed, prompts: Path, tmp_path: Path
) -> None:
    lines = [json.dumps(row) for row in pq.read_table(prompts).to_pylist()]
    path = tmp_path / "prompts.jsonl"  # text, so that all three convert it
    path.write_text("\n".join(lines))
    runs = [cli.start("run", str(job(cli, path)), "--json") for _ in range(3)]
    for run in runs:
        _, err = run.communicate(timeout=60)
        assert run.returncode == 0, err
    store = run_in(tmp_path / "out")
    check_whole(store, tmp_path, undisturbed)
    assert len(owners(store)) > 1, "one of them did everything"
