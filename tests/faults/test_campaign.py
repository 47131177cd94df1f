"""The short form of `python -m tests.faults.campaign`, and proof that its checks can fail."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from storage import keys
from storage.local_store import LocalStore
from storage.object_store import StorageConfig
from tests.faults.campaign import NUM_ROWS, SKEW_S, Campaign
from tests.faults.disks import full_disk, small_disk
from tests.faults.forked import Forks
from tests.faults.journal_bug import stages_damage, trusting_journal
from tests.faults.lives import Life, Tally
from tests.faults.store_checks import Watcher, check_run
from tests.processes import cli_in
from tests.seaweed import Seaweed

BUDGET = {"plan": 2.0, "shards": 4.0, "publish": 2.0, "retry": 3.0, "collect": 1.0}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    folder = tmp_path_factory.mktemp("campaign")
    with cli_in(folder) as cli, Forks(folder) as forks:
        campaign = Campaign(folder, cli, forks, random.randrange(1 << 30), 0, 0)
        print("seed", campaign.seed)
        campaign.make_reference()
        yield campaign


@pytest.fixture(scope="module")
def life(campaign: Campaign) -> Life:
    """A life that was lived."""
    out = campaign.folder / "life"
    life = Life(
        forks=campaign.forks,
        job=campaign.job("life", str(out)),
        out=str(out),
        direct=StorageConfig(),
        endpoint_url=None,
        rng=random.Random(campaign.seed),
        tally=Tally(),
        reference=campaign.reference,
        folder=campaign.folder,
        budget=dict(BUDGET),
        skew_s=SKEW_S,
    )
    life.live()
    return life


def test_a_life_under_kills_wrong_clocks_and_broken_leases_has_every_row_once(life: Life) -> None:
    assert life.tally.wrong == []
    assert life.tally.num_kills >= 3
    assert life.tally.rows == NUM_ROWS


def run_folder(life: Life) -> Path:
    (record,) = Path(life.out).glob("*/run.json")
    return record.parent


def swap_parts(run: Path) -> None:
    first, second = run / keys.completions(0), run / keys.completions(1)
    first.write_bytes(second.read_bytes())


def lose_a_part(run: Path) -> None:
    for info in LocalStore(run).list(keys.ATTEMPTS):
        if info.key.endswith("completions.parquet"):
            (run / info.key).unlink()
            return


def add_a_stranger(run: Path) -> None:
    shutil.copy(run / keys.completions(0), run / keys.completions(99))


def miscount(run: Path) -> None:
    for path in run.glob("manifest*.json"):
        manifest = json.loads(path.read_text())
        manifest["counts"]["ok"] -= 1
        path.write_text(json.dumps(manifest))


def repeat_a_row(run: Path) -> None:
    path = run / keys.completions(0)
    table = pq.read_table(path)
    pq.write_table(table.take([0, 0, *range(2, table.num_rows)]), path)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (swap_parts, "not the part of revision"),
        (lose_a_part, "its part is not there"),
        (add_a_stranger, "of no commit"),
        (miscount, "the parts have"),
        (repeat_a_row, "each once and in order"),
    ],
)
def test_the_checks_see_damage(
    life: Life, tmp_path: Path, damage: Callable[[Path], None], what: str
) -> None:
    run = shutil.copytree(run_folder(life), tmp_path / "run")
    assert check_run(LocalStore(run), NUM_ROWS)[0] == []
    damage(run)
    watcher = Watcher(LocalStore(run), 1.0)
    watcher.look()
    assert any(what in told for told in [*check_run(LocalStore(run), NUM_ROWS)[0], *watcher.wrong])


def test_the_watcher_sees_a_commit_that_changes_and_one_that_vanishes(
    life: Life, tmp_path: Path
) -> None:
    run = shutil.copytree(run_folder(life), tmp_path / "run")
    watcher = Watcher(LocalStore(run), 1.0)
    watcher.look()
    assert watcher.wrong == []
    first, second = run / keys.commit(0), run / keys.commit(1)
    first.write_text(first.read_text().replace('"holder"', '"holder" '))
    second.unlink()
    watcher.look()
    assert watcher.wrong == [f"{keys.commit(1)} vanished", f"{keys.commit(0)} changed"]


def test_a_disk_that_is_full_again_and_again_loses_nothing(
    campaign: Campaign, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", kib=160) as disk:
        if disk is None:
            pytest.skip("mounting a small tmpfs needs root")
        job = campaign.job("disk", str(disk))
        num_full, _, wrong = full_disk(
            campaign.forks, disk, job, NUM_ROWS, seed=campaign.seed, step_kib=80
        )
    assert wrong == []
    assert num_full >= 2


def test_a_stager_that_trusts_its_journal_is_caught(seaweed: Seaweed, tmp_path: Path) -> None:
    assert not stages_damage(seaweed.port, seaweed.bucket, tmp_path / "right")
    with trusting_journal():
        assert stages_damage(seaweed.port, seaweed.bucket, tmp_path / "bug")
