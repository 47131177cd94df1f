"""Waves of replicas: launched as the store says, bounded, and never relied upon."""

import dataclasses
import math
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prefect.states import Cancelling, Running

from flows.config import load_job
from flows.fleet import is_left_cancelling
from storage.attempts import claim_attempt, record_failure
from storage.errors import CorruptObject, StoreUnavailable
from tasks.budget import BudgetSpent
from tasks.canary import CanaryFailed
from tasks.cancel import cancel
from tasks.drain import drain
from tasks.job_machine import BudgetConfig
from tasks.progress import Progress
from tasks.run import Run, prepare
from tasks.stop import Stopped, StopSignal
from tasks.waves import MAX_IDLE_WAVES, Limits, desired_replicas, drain_by_waves, exhausted

NUM_SHARDS = 6


@pytest.fixture
def run(tmp_path) -> Iterator[Run]:
    pq.write_table(
        pa.table({"prompt": [f"tell me {i}" for i in range(NUM_SHARDS)]}), tmp_path / "in.parquet"
    )
    job = {
        "model": {"source": "none"},
        "input": {"uri": str(tmp_path / "in.parquet"), "prompt_column": "prompt"},
        "output": {"uri": str(tmp_path / "out")},
        "shards": {"max_rows": 1, "max_attempts": 2},
        "engine": {"backend": "dummy"},
    }
    (tmp_path / "work").mkdir()
    run = prepare(load_job(job), work_dir=tmp_path / "work", progress=Progress())
    yield run
    run.close()


class Threads:
    """A fleet of threads in this process; each really drains the run, or does what `work` does."""

    def __init__(self, run, work=None):
        self.run = run
        self.launched: list[tuple[int, int]] = []
        self.threads: list[threading.Thread] = []
        self.num_dismissed = 0
        self.stop = StopSignal()
        self.work = work or (
            lambda: drain(run, invocation="inv", progress=Progress(), should_stop=self.stop)
        )

    def launch(self, wave, count):
        self.launched.append((wave, count))
        for _ in range(count):
            thread = threading.Thread(target=self._guarded)
            thread.start()
            self.threads.append(thread)

    def _guarded(self):
        try:
            self.work()
        except Stopped:
            return

    def num_live(self):
        return sum(thread.is_alive() for thread in self.threads)

    def num_running(self):
        return self.num_live()

    def last_words(self):
        return "flow run bold-owl: no image"

    def dismiss(self):
        """Threads start at once: there is nobody to call off."""
        self.num_dismissed += 1

    def cancel(self):
        self.stop.set()
        for thread in self.threads:
            thread.join(30)


def limits(**changes):
    return Limits(
        **{
            "replicas": 1,
            "max_replicas": 4,
            "max_attempts": 2,
            "poll_s": 0.05,
            "pause_s": 0.05,
            **changes,
        }
    )


def waves(run, fleet, should_stop=None, **changes):
    return drain_by_waves(
        run,
        fleet,
        invocation="inv",
        limits=limits(**changes),
        should_stop=should_stop or StopSignal(),
    )


def test_one_wave_drains_a_run_and_no_more_replicas_are_started_than_there_are_shards(run):
    fleet = Threads(run)
    assert waves(run, fleet, replicas=20, max_replicas=20) == {}
    assert len(run.commits()) == NUM_SHARDS
    assert fleet.launched[0] == (0, NUM_SHARDS)


def test_replicas_that_do_nothing_are_bounded_and_the_reason_is_told(run):
    fleet = Threads(run, work=lambda: None)
    given_up = waves(run, fleet)
    assert set(given_up) == set(range(NUM_SHARDS))
    assert given_up[0] == "3 waves of replicas committed nothing; flow run bold-owl: no image"
    assert [wave for wave, _ in fleet.launched] == list(range(MAX_IDLE_WAVES))


def test_a_wave_that_dies_is_followed_by_another_until_all_is_done(run):
    lives = iter([False, False, True])
    fleet = Threads(run)
    real = fleet.work
    fleet.work = lambda: real() if next(lives) else None
    assert waves(run, fleet) == {}
    assert [wave for wave, _ in fleet.launched] == [0, 1, 2]


def test_a_poison_shard_is_set_aside_and_the_others_are_finished(run):
    claim_attempt(run.store, 2, "inv", "dead")
    claim_attempt(run.store, 2, "inv", "dead too")
    fleet = Threads(run)
    given_up = waves(run, fleet)
    assert given_up == {2: "2 replicas died while they worked on it"}
    assert set(run.commits()) == set(range(NUM_SHARDS)) - {2}


def test_attempts_are_bounded_within_one_start_and_a_fatal_failure_ends_them_at_once(run):
    for _ in range(2):
        attempt = claim_attempt(run.store, 0, "an earlier start", "holder")
        record_failure(run.store, 0, attempt, StoreUnavailable("503"))
    attempt = claim_attempt(run.store, 1, "inv", "holder")
    record_failure(run.store, 1, attempt, StoreUnavailable("503"))
    attempt = claim_attempt(run.store, 3, "inv", "holder")
    record_failure(run.store, 3, attempt, CorruptObject("a torn file"))
    found = exhausted(run, range(NUM_SHARDS), "inv", 2)
    assert found == {3: "CorruptObject: a torn file"}


def test_a_cancelled_start_stops_the_waves_and_the_fleet(run):
    fleet = Threads(run, work=lambda: fleet.stop.wait(30))
    threading.Timer(0.3, cancel, (run.store, "inv")).start()
    with pytest.raises(Stopped):
        waves(run, fleet)
    assert fleet.num_live() == 0


def test_silent_replicas_are_taken_for_lost_and_replaced(run):
    fleet = Threads(run)
    is_first = iter([True])

    def work():
        if next(is_first, False):
            fleet.stop.wait(30)
            fleet.stop = StopSignal()
        else:
            drain(run, invocation="inv", progress=Progress(), should_stop=StopSignal())

    fleet.work = work
    assert waves(run, fleet, silent_s=3) == {}
    assert fleet.launched[:2] == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("seconds_left", "elapsed_s", "num_missing", "shard_s", "wanted"),
    [
        (math.inf, 0, 100, 60, 2),  # no deadline: what was asked for
        (3600, 0, 100, 0, 2),  # nothing measured yet
        (3600, 0, 100, 60, 2),  # 6000 s of work in 3600 s
        (3600, 1800, 100, 60, 4),  # late
        (3600, 3500, 100, 60, 5),  # very late: all there may be
        (3600, 4000, 1, 60, 2),  # past it: no fewer than asked for
    ],
)
def test_replicas_follow_the_backlog_and_the_deadline(
    seconds_left, elapsed_s, num_missing, shard_s, wanted
):
    found = desired_replicas(
        limits(replicas=2, max_replicas=5, seconds_left=seconds_left),
        elapsed_s=elapsed_s,
        num_missing=num_missing,
        shard_s=shard_s,
    )
    assert found == wanted


@pytest.fixture
def spent_run(run) -> Run:
    """One shard is committed, and it has cost more than the budget."""
    stop = StopSignal()

    def only_one(replica, shard_id):
        outcome = replica.finish_shard(shard_id)
        stop.set()
        return outcome

    hardware = dataclasses.replace(run.job.hardware, price_per_hour=1e6)
    run.job = dataclasses.replace(run.job, hardware=hardware)
    with pytest.raises(Stopped):
        drain(run, invocation="a", progress=Progress(), should_stop=stop, run_shard=only_one)
    assert run.commits()
    run.job = dataclasses.replace(run.job, budget=BudgetConfig(usd=1e-6))
    return run


def test_no_replica_is_launched_once_the_budget_is_spent(spent_run):
    fleet = Threads(spent_run)
    with pytest.raises(BudgetSpent, match=r"budget\.usd"):
        waves(spent_run, fleet)
    assert fleet.launched == []
    assert fleet.num_dismissed == 1, "replicas that wait for a machine are called off"


def test_a_spent_budget_does_not_wait_for_a_replica_that_was_called_off(spent_run):
    class CalledOff(Threads):
        """Its replica never started, and is left between two states."""

        def num_live(self):
            return 1

        def num_running(self):
            return 0

    with pytest.raises(BudgetSpent, match=r"budget\.usd"):
        waves(spent_run, CalledOff(spent_run))


@pytest.mark.parametrize(
    ("state", "age_s", "is_left"),
    [(Cancelling, 301, True), (Cancelling, 10, False), (Running, 301, False)],
)
def test_a_flow_run_left_in_cancelling_is_taken_for_over(state, age_s, is_left):
    at = datetime.now(UTC) - timedelta(seconds=age_s)
    assert is_left_cancelling(state(timestamp=at)) is is_left


def test_one_replica_is_there_until_it_may_grow_and_then_the_rest_come(run):
    is_good = threading.Event()

    def work():
        is_good.wait(30)
        drain(run, invocation="inv", progress=Progress(), should_stop=fleet.stop)

    fleet = Threads(run, work=work)
    looks = 0

    def may_grow():
        nonlocal looks
        looks += 1
        if looks == 5:
            is_good.set()
        return looks >= 5

    given_up = drain_by_waves(
        run,
        fleet,
        invocation="inv",
        limits=limits(replicas=3),
        should_stop=StopSignal(),
        may_grow=may_grow,
    )
    assert given_up == {}
    assert fleet.launched[0] == (0, 1)
    assert sum(count for _, count in fleet.launched) == 3


def test_a_canary_that_dies_each_time_ends_the_waves_with_one_replica_at_a_time(run):
    fleet = Threads(run, work=lambda: None)
    given_up = drain_by_waves(
        run,
        fleet,
        invocation="inv",
        limits=limits(replicas=3),
        should_stop=StopSignal(),
        may_grow=lambda: False,
    )
    assert set(given_up) == set(range(NUM_SHARDS))
    assert fleet.launched == [(wave, 1) for wave in range(MAX_IDLE_WAVES)]


def test_a_bad_canary_stops_the_replica_that_is_there_and_launches_no_other(run):
    fleet = Threads(run, work=lambda: fleet.stop.wait(30))
    looks = iter([False, False])

    def may_grow():
        for look in looks:
            return look
        raise CanaryFailed("canary of 2 rows: error_rate is 1.00")

    with pytest.raises(CanaryFailed):
        drain_by_waves(
            run,
            fleet,
            invocation="inv",
            limits=limits(replicas=3),
            should_stop=StopSignal(),
            may_grow=may_grow,
        )
    assert fleet.launched == [(0, 1)]
    assert fleet.num_live() == 0
    assert run.commits() == {}
