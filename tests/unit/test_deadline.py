"""Times of day in the user's zone, right on the days when clocks change."""

from datetime import datetime

import pytest

from storage.errors import BadInput
from tasks.deadline import deadline_at, next_time


def at(text):
    return datetime.fromisoformat(text)


@pytest.mark.parametrize(
    ("text", "now", "expected"),
    [
        ("06:00 Europe/Berlin", "2026-03-27T12:00+00:00", "2026-03-28T05:00+00:00"),
        ("06:00 Europe/Berlin", "2026-03-28T12:00+00:00", "2026-03-29T04:00+00:00"),
        # 02:30 does not exist that night; 03:30 is the same moment.
        ("02:30 Europe/Berlin", "2026-03-28T12:00+00:00", "2026-03-29T01:30+00:00"),
        # 02:30 comes twice that night; the first is meant.
        ("02:30 Europe/Berlin", "2026-10-24T12:00+00:00", "2026-10-25T00:30+00:00"),
        ("02:30 Europe/Berlin", "2026-10-25T12:00+00:00", "2026-10-26T01:30+00:00"),
        ("23:10", "2026-06-01T00:00+00:00", "2026-06-01T17:40+00:00"),
        ("0:00 Asia/Kolkata", "2026-06-01T18:30+00:00", "2026-06-02T18:30+00:00"),
    ],
)
def test_the_next_time_of_day_is_local(text, now, expected):
    assert next_time(text, timezone="Asia/Kolkata", now=at(now)) == at(expected)


@pytest.mark.parametrize("text", ["25:00", "6 pm", "06:00 Europe/Berlinn", ""])
def test_what_is_no_time_of_day_is_refused_with_an_example(text):
    with pytest.raises(BadInput, match="Europe/Berlin"):
        next_time(text, timezone="UTC", now=at("2026-06-01T00:00+00:00"))


@pytest.mark.parametrize("text", ["06:00 Europe", "06:00 Mars/Olympus", "0001-01-01T00:00+14:00"])
def test_a_zone_that_is_none_and_a_day_beyond_the_calendar_are_refused(text):
    with pytest.raises(BadInput):
        deadline_at(text, start=at("2026-06-01T00:00+00:00"))
