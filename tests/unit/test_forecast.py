import dataclasses
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.config import load_job
from storage.errors import BadInput
from tasks.deadline import deadline_at
from tasks.forecast import Work, forecast, lengths_of, lengths_of_canary, speed_of
from tasks.history import History, PastRun, history_key, open_history, read_history, remember
from tasks.lengths import bucket, merged, quantile

EVENING = datetime(2026, 7, 1, 20, 0, tzinfo=UTC)
PAST = PastRun(
    run_id="r1",
    published_at="2026-06-30T04:00:00+00:00",
    backend="paged",
    device="NVIDIA H100 80GB HBM3",
    num_replicas=2,
    num_rows=1000,
    num_prompt_tokens=200_000,
    num_completion_tokens=300_000,
    completion_tokens_histogram={"256": 500, "362": 500},
    replica_seconds={
        "load": 20.0,
        "warm_up": 20.0,
        "prefill": 10.0,
        "decode": 90.0,
        "tail": 10.0,
        "other": 5.0,
    },
    rows_by_state={"ok": 1000},
    wall_s=80.0,
)


def job(folder, **changes):
    values = {
        "model": {"source": "m"},
        "input": {"uri": "in", "prompt": "{text}"},
        "output": {"uri": f"{folder}/out"},
    }
    return load_job({**values, **changes})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("06:00 Europe/Berlin", "2026-07-02T04:00:00+00:00"),
        ("21:30", "2026-07-01T21:30:00+00:00"),
        ("19:59", "2026-07-02T19:59:00+00:00"),
        ("2026-07-03T01:00+02:00", "2026-07-02T23:00:00+00:00"),
    ],
)
def test_a_deadline_is_the_next_such_moment(text, expected):
    assert deadline_at(text, start=EVENING).isoformat() == expected


def test_a_deadline_keeps_its_place_on_the_wall_clock_when_the_clocks_change():
    before = datetime(2026, 10, 24, 20, 0, tzinfo=UTC)
    assert (
        deadline_at("06:00 Europe/Berlin", start=before).isoformat() == "2026-10-25T05:00:00+00:00"
    )


@pytest.mark.parametrize("text", ["6 am", "25:00", "06:00 Mars/Base", ""])
def test_a_deadline_nobody_can_read_is_refused(text):
    with pytest.raises(BadInput, match=r"^deadline: .*(write it as|use a name)"):
        deadline_at(text, start=EVENING)


@given(st.integers(0, 10**7))
def test_a_bucket_holds_its_count_and_is_at_most_a_fifth_above(num_tokens):
    bound = bucket(num_tokens)
    assert num_tokens <= bound <= max(num_tokens, num_tokens * 1.19 + 2)
    assert bucket(bound) == bound


def test_quantiles_are_read_off_merged_histograms():
    histogram = merged([{"4": 5, "64": 1}, {"16": 4}])
    assert list(histogram) == ["4", "16", "64"]
    assert [quantile(histogram, share) for share in (0.5, 0.9, 1.0)] == [4, 16, 64]
    assert quantile({}, 0.5) is None


def test_the_same_work_is_forecast_to_take_as_long_as_it_took():
    made = forecast(
        work=Work(num_sequences=1000, num_prefill_tokens=200_000),
        lengths=lengths_of(History((PAST,)), 512),
        speed=speed_of(PAST),
        tier_seconds=(1.0, 1.0),
        starts_at=EVENING,
        replicas=2,
        price_per_hour=3.0,
        deadline=deadline_at("20:02", start=EVENING),
        budget_usd=0.01,
    )
    # 40 s of starting and 10 s of tail over two replicas, then 105 s of work over two.
    assert made.seconds_p50 == pytest.approx(25 + 105 / 2)
    assert made.seconds_p90 is not None
    assert made.seconds_p90 > made.seconds_p50
    assert made.usd_p50 == pytest.approx(made.seconds_p50 * 2 * 3.0 / 3600, rel=0.01)
    assert (made.is_late, made.is_over_budget) == (False, True)
    assert made.lengths.basis == "history"
    assert "as in run r1" in made.sentence


def test_a_tail_is_paid_for_once_with_the_tokens_it_makes_however_many_rows_there_are():
    # 16 sequences at a time, 10 ms a step; the last 200 steps run ever emptier.
    def took(num_tokens):
        return (num_tokens - 1_600) / 16 * 0.01, 200 * 0.01, 1_600

    decode_s, tail_s, in_tail = took(8_000)
    first = dataclasses.replace(
        PAST,
        num_replicas=1,
        num_rows=80,
        num_completion_tokens=8_000,
        num_tail_tokens=in_tail,
        replica_seconds={"decode": decode_s, "tail": tail_s, "load": 3.0},
    )
    speed = speed_of(first)
    for num_rows in (20, 80, 800):
        decode_s, tail_s, _ = took(num_rows * 100)
        wanted = 3.0 + decode_s + tail_s
        found = speed.seconds(Work(num_sequences=num_rows, num_prefill_tokens=0), 100.0, 1)
        assert found == pytest.approx(wanted)
    nearly_nothing = speed.seconds(Work(num_sequences=1, num_prefill_tokens=0), 16.0, 1)
    assert nearly_nothing == pytest.approx(3.0 + tail_s * 16 / 1_600)


def test_p90_follows_the_scatter_of_earlier_runs_on_such_a_device():
    slower = dataclasses.replace(PAST, replica_seconds={"decode": 140.0, "tail": 10.0})
    elsewhere = dataclasses.replace(slower, device="cpu")
    alone = speed_of(PAST, History((elsewhere, PAST))).spread
    assert alone == speed_of(PAST).spread == 0.25
    assert speed_of(PAST, History((PAST, PAST, PAST))).spread == 0.10
    assert speed_of(PAST, History((slower, PAST))).spread > 0.3


def test_a_canary_is_paid_for_only_where_the_new_run_has_one():
    sampled = dataclasses.replace(
        PAST, replica_seconds={**PAST.replica_seconds, "canary": 6.0}, num_replicas=1
    )
    assert speed_of(sampled).start_s - speed_of(sampled, has_canary=False).start_s == 6.0


def test_without_history_max_tokens_bounds_the_lengths_and_the_sentence_says_so():
    made = forecast(
        work=Work(num_sequences=10, num_prefill_tokens=100),
        lengths=lengths_of(History(), 512),
        speed=None,
        tier_seconds=None,
        starts_at=EVENING,
        deadline=deadline_at("21:00", start=EVENING),
    )
    assert (made.num_completion_tokens_p50, made.num_completion_tokens_p90) == (2560, 5120)
    assert made.seconds_p50 is None
    assert made.is_late is None
    assert "not known" in made.sentence
    assert "half of max_tokens (512) is assumed" in made.sentence


def test_a_canary_says_how_many_rows_it_had():
    found = lengths_of_canary(64, 6400, 512)
    assert (found.basis, found.mean) == ("canary", 100)
    assert found.high > 100
    assert "canary of 64 rows" in found.sentence


def test_history_is_kept_by_template_and_model_and_a_run_replaces_itself(tmp_path):
    first = job(tmp_path)
    remember(first, PAST)
    remember(first, dataclasses.replace(PAST, run_id="r2"))
    remember(first, dataclasses.replace(PAST, run_id="r1", num_rows=7))
    assert [(run.run_id, run.num_rows) for run in read_history(first).runs] == [
        ("r2", 1000),
        ("r1", 7),
    ]
    other = job(tmp_path, input={"uri": "in", "prompt": "Say {text}"})
    assert read_history(other) == History()
    elsewhere = job(tmp_path, input={"uri": "tonight", "prompt": "{text}"}, name="tomorrow")
    assert len(read_history(elsewhere).runs) == 2


def test_a_damaged_history_is_an_empty_one(tmp_path):
    this = job(tmp_path)
    for data in (b"not json", b"[]", b'{"runs": [{"run_id": 1}]}'):
        open_history(this).put(history_key(this), data)
        assert read_history(this) == History()


def test_history_lies_above_the_dated_folder():
    dated = job("s3://bucket/x", output={"uri": "s3://bucket/results/{date:%Y}/night/"})
    assert dated.output.history == "s3://bucket/results/_history"
    assert load_job(dataclasses.asdict(dated)) == dated
