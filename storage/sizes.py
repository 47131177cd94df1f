"""Sizes as people write them: 200GB is 200 * 10^9 bytes, 200GiB is 200 * 2^30."""

import re

from storage.errors import BadInput

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str | int | None, *, name: str) -> int | None:
    """Return the bytes that a size means; a number without a unit is bytes, None stays None.

    Args:
        name: Of the setting or flag, for the error.

    Raises:
        BadInput: it is no size, or none above 0.
    """
    if text is None:
        return None
    found = _SIZE.fullmatch(str(text).strip())
    if found is None or not float(found[1]):
        raise BadInput(
            f"{name}: {str(text)[:100]!r} is no size above 0; write it as 200GB or 64GiB"
        )
    number, unit, binary = found.groups()
    power = "KMGT".index(unit.upper()) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)
