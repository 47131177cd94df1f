"""A deadline as people write it, `06:00 Europe/Berlin`, to a moment."""

import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from storage.errors import BadInput

_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?:\s+(\S+))?")


def deadline_at(text: str, *, start: datetime, timezone: str = "UTC") -> datetime:
    """Return the first such moment after `start`, in UTC.

    Args:
        text: `HH:MM`, with a time zone's name if it is not the job's; or an ISO date and time.
        start: When the run begins, with a time zone.
        timezone: The job's, for text that names none.

    Raises:
        BadInput: neither form, or an unknown time zone.
    """
    match = _CLOCK.fullmatch(text.strip())
    try:
        if match is None:
            moment = datetime.fromisoformat(text.strip())
            zone = moment.tzinfo or ZoneInfo(timezone)
            return moment.replace(tzinfo=zone).astimezone(UTC)
        zone = ZoneInfo(match[3] or timezone)
        local = start.astimezone(zone)
        moment = local.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
        # A day on the wall clock, not 24 hours: the clocks may change tonight.
        later = moment if moment > local else moment + timedelta(days=1)
        return later.astimezone(UTC)
    except (ValueError, ZoneInfoNotFoundError) as error:
        raise BadInput(
            f"deadline: got {text!r} ({error}); write it as '06:00 Europe/Berlin'"
        ) from None
