import dataclasses
from datetime import UTC, datetime, timedelta

import pytest

from flows.config import load_job
from flows.console import status_line
from storage import keys
from storage.manifest import CommitRecord, PartFile, PlanManifest, Shard
from storage.memory_store import MemoryStore
from tasks.budget import BudgetGate, check_budget
from tasks.forecast import Speed, Work, forecast, lengths_of
from tasks.history import History
from tasks.outlook import outlook
from tasks.progress import Progress
from tasks.status import RunStatus
from tasks.watch import Watch

START = datetime(2026, 7, 1, 20, 0, tzinfo=UTC)
PLAN = PlanManifest(
    run_id="r",
    fingerprint="f",
    table_digest="t",
    num_shards=20,
    num_rows=2000,
    num_samples=1,
    num_prompt_tokens=20_000,
    num_bad_rows=0,
    bad_rows_by_state={},
    bad_row_examples=[],
    input_schema="",
    inputs=[],
)
SHARDS = [
    Shard(shard_id=i, row_start=100 * i, row_end=100 * (i + 1), num_prompt_tokens=1000)
    for i in range(20)
]


def job(**changes):
    values = {"model": {"source": "m"}, "input": {"uri": "in"}, "output": {"uri": "memory://o"}}
    return load_job({**values, **changes})


def commit(shard_id, *, wall_s=60.0, at=60.0, holder="a", usd=0.5, revision=1):
    return CommitRecord(
        shard_id=shard_id,
        revision=revision,
        nonce=f"{shard_id}-{revision}",
        attempt=1,
        plan_digest="p",
        row_start=100 * shard_id,
        row_end=100 * (shard_id + 1),
        part=PartFile(key="k", size=1, sha256="s", num_rows=100),
        counts={"ok": 100},
        receipt={
            "wall_s": wall_s,
            "seconds": {"decode": wall_s},
            "num_sequences": 100,
            "num_completion_tokens": 10_000,
            "usd": usd,
        },
        holder=holder,
        committed_at=(START + timedelta(seconds=at)).isoformat(),
    )


def see(commits, *, holders=None, at=120.0, **changes):
    return outlook(
        job(**changes),
        PLAN,
        SHARDS,
        {c.shard_id: c for c in commits},
        holders={"a": 1} if holders is None else holders,
        started_at=START,
        now=START + timedelta(seconds=at),
    )


def test_what_is_left_takes_as_long_as_what_is_done():
    found = see([commit(i, at=60.0 * (i + 1)) for i in range(10)], at=600)
    assert found.seconds_p50 == pytest.approx(600, rel=0.01)
    assert found.seconds_p90 == pytest.approx(600, rel=0.01), "equal shards leave nothing to chance"
    assert found.completion_tokens_per_s == pytest.approx(10_000 / 60, rel=0.01)


def test_more_replicas_are_sooner_done_and_the_last_shard_keeps_one_alone():
    commits = [commit(i, at=60.0 * (i // 2 + 1), holder="ab"[i % 2]) for i in range(10)]
    found = see(commits, holders={"a": 1, "b": 1}, at=300)
    assert found.seconds_p50 == pytest.approx(300, rel=0.01)
    assert found.seconds_p90 == pytest.approx(330, rel=0.01)


def test_scatter_and_few_shards_widen_the_forecast():
    even = see([commit(i, at=60.0 * (i + 1)) for i in range(4)], at=240)
    uneven = see(
        [commit(i, wall_s=w, at=60.0 * (i + 1)) for i, w in enumerate((20, 100, 30, 90))], at=240
    )
    one = see([commit(0)], at=60)
    assert even.seconds_p90 - even.seconds_p50 < 1
    assert uneven.seconds_p90 > uneven.seconds_p50 * 1.3
    assert one.seconds_p90 > one.seconds_p50 * 1.3


def test_the_warning_comes_the_moment_p90_passes_the_deadline_and_only_once():
    progress, watch = Progress(), None
    watch = Watch(progress)
    fast = see([commit(i, at=60.0 * (i + 1)) for i in range(10)], at=600, deadline="20:30")
    assert (fast.is_late, fast.warning) == (False, None)
    slow = see(
        [commit(i, wall_s=120, at=120.0 * (i + 1)) for i in range(10)], at=1200, deadline="20:30"
    )
    assert slow.is_late
    for found in (None, fast, slow, slow, fast):
        watch.see(found)
    notes = progress.take_notes()
    assert len(notes) == 2
    assert notes[0].startswith("warning: P90 finish 2026-07-01T20:40+00:00 is past the deadline")
    assert notes[1].startswith("back on time")
    assert progress.snapshot().finish_p50 == fast.finish_p50


def test_dollars_to_come_are_set_against_the_budget():
    commits = [commit(i, at=60.0 * (i + 1)) for i in range(10)]
    within = see(commits, at=600, budget={"usd": 11.0})
    assert (within.usd, within.is_over_budget) == (5.0, False)
    assert within.usd_p90 == pytest.approx(10.0, rel=0.01)
    over = see(commits, at=600, budget={"usd": 9.0})
    assert over.warning == "P90 cost $10.00 is over the budget of $9.00"


def test_nothing_committed_and_nothing_left_are_said_plainly():
    fresh = see([], holders={})
    assert (fresh.seconds_p50, fresh.is_running, fresh.num_shards_left) == (None, False, 20)
    done = see([commit(i) for i in range(20)])
    assert (done.seconds_p50, done.num_shards_left) == (0.0, 0)


def test_a_status_line_speaks_of_the_whole_run():
    found = see(
        [commit(i, wall_s=120, at=120.0 * (i + 1)) for i in range(10)], at=1200, deadline="20:30"
    )
    status = RunStatus(
        uri="u",
        run_id="r",
        name="n",
        is_planned=True,
        num_shards=20,
        num_committed=10,
        num_rows=2000,
        rows_by_state={"ok": 1000},
        outlook=found,
    )
    line = status_line(status)
    assert line.startswith(
        "not published | 1,000/2,000 rows | 10/20 shards | 1 replicas | 83 tokens/s"
    )
    assert "WARNING: P90 finish" in line


class CountedStore(MemoryStore):
    """Counts its listings."""

    num_listings = 0

    def list(self, prefix=""):
        self.num_listings += 1
        return super().list(prefix)


def test_far_from_its_budget_a_gate_seldom_looks_and_near_it_every_time(frozen_clock):
    store = CountedStore(clock=frozen_clock)
    price = commit(0).receipt["usd"]
    gate = BudgetGate(store=store, usd=90 * price + 0.01, most_unseen=16)
    looks = []
    for shard_id in range(100):
        store.put(keys.commit(shard_id), commit(shard_id).to_json())
        before = store.num_listings
        is_allowed = gate.allows()
        looks.append(store.num_listings > before)
        if not is_allowed:
            break
    assert shard_id + 1 == 90, "all that fits and no more, whatever was not looked at"
    assert sum(looks[:60]) < 8
    assert all(looks[-3:])


def test_the_gate_closes_before_a_shard_that_would_not_fit(memory_store):
    gate = BudgetGate(store=memory_store, usd=2.0)
    assert gate.allows(), "nothing is known of the price yet"
    for shard_id in range(3):
        memory_store.put(keys.commit(shard_id), commit(shard_id).to_json())
        assert gate.allows() is (shard_id < 3)
    memory_store.put(keys.commit(1, 2), commit(1, revision=2).to_json())
    assert not gate.allows(), "a redone shard cost twice"
    assert gate.reason is not None
    assert "budget.usd is 2.00: 2.0000 are spent on 3 shards" in gate.reason
    assert BudgetGate(store=memory_store, usd=None).allows()


def test_a_forecast_over_the_budget_refuses_the_run_with_what_it_rests_on():
    from storage.errors import BadInput

    speed = Speed(
        basis="history",
        start_s=0.0,
        tail_s=0.0,
        tail_tokens=0.0,
        prefill_s_per_token=0.0,
        decode_s_per_token=0.1,
        other_s_per_sequence=0.0,
        spread=0.1,
    )
    made = forecast(
        work=Work(num_sequences=1000, num_prefill_tokens=0),
        lengths=lengths_of(History(), 512),
        speed=speed,
        tier_seconds=None,
        starts_at=START,
        price_per_hour=2.0,
    )
    check_budget(job(), made)
    check_budget(job(budget={"usd": 20}), made)
    with pytest.raises(
        BadInput, match=r"budget.usd is 10.00, the forecast is 14.22 to 31.29 .*half of"
    ):
        check_budget(job(budget={"usd": 10}), made)
    unpriced = dataclasses.replace(made, usd_p50=None)
    check_budget(job(budget={"usd": 0.01}), unpriced)
