"""`06:00 Europe/Berlin` -> the next such moment."""

import re
from datetime import datetime, time, timedelta
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
    except (ZoneInfoNotFoundError, ValueError) as error:
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
