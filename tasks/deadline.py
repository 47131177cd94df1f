"""A moment as people write it: `06:00 Europe/Berlin`, or an ISO date and time."""

import re
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from storage.errors import BadInput

_TIME = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)(?:\s+(\S+))?")


def next_time(text: str, *, timezone: str, now: datetime) -> datetime:
    """Return the first moment after `now` at which the clock of the zone shows `HH:MM`.

    A time that the spring change skips is an hour later; one that the autumn change repeats is its
    first occurrence.

    Raises:
        BadInput: not `HH:MM` or `HH:MM Zone`.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise BadInput(
            f"{text!r} is not a time of day; write it as HH:MM or as in 06:00 Europe/Berlin"
        )
    try:
        zone = ZoneInfo(match[3] or timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:  # OSError: a folder of zones
        raise BadInput(
            f"{text!r}: no time zone {match[3]!r}; use a name such as Europe/Berlin"
        ) from error
    at = time(int(match[1]), int(match[2]))
    day = now.astimezone(zone).date()
    for offset in range(3):
        moment = datetime.combine(day + timedelta(days=offset), at, tzinfo=zone).astimezone(
            now.tzinfo
        )
        if moment > now:
            return moment
    raise AssertionError(f"no {text} within two days of {now}")


def deadline_at(text: str, *, start: datetime, timezone: str = "UTC") -> datetime:
    """Return a deadline's moment in UTC: the next `HH:MM` after `start`, or the ISO date and time given.

    Args:
        text: `HH:MM`, with a time zone's name if it is not the job's; or an ISO date and time.
        start: When the run begins, with a time zone.
        timezone: The job's, for text that names none.

    Raises:
        BadInput: neither form, or an unknown time zone.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return _next_deadline(text, timezone, start)
    try:
        return moment.replace(tzinfo=moment.tzinfo or ZoneInfo(timezone)).astimezone(UTC)
    except OverflowError:
        raise BadInput(f"deadline: {text!r} is beyond all calendars") from None


def _next_deadline(text: str, timezone: str, start: datetime) -> datetime:
    try:
        return next_time(text, timezone=timezone, now=start).astimezone(UTC)
    except BadInput as error:
        raise BadInput(f"deadline: {error}") from None
