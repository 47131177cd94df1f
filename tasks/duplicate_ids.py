"""Ids that repeat: found by 8-byte digests of every row's id, then named from the rows themselves."""

from array import array
from typing import Any

import numpy as np

from storage.errors import BadInput
from tasks.feed_process import FeedProcess
from tasks.plan_inputs import PlannedInput

_MAX_NAMED = 10
_MAX_ID_CHARS = 80


def num_repeated(digests: "array[int]") -> int:
    """Count rows with a digest that an earlier row has, as far as 8 bytes can tell."""
    found = np.frombuffer(digests, dtype="<u8")
    return len(found) - len(np.unique(found))


def check_ids(
    planned: PlannedInput, column: str, digests: dict[str, Any], process: FeedProcess
) -> None:
    """Refuse ids that repeat.

    Raises:
        BadInput: names the first repeated id, and the lines (text input) or rows that have it.
    """
    found = np.frombuffer(digests["digest"], dtype="<u8")
    rows = np.frombuffer(digests["row"], dtype="<i8")
    order = np.argsort(found, kind="stable")
    is_repeat = found[order][1:] == found[order][:-1]
    if not is_repeat.any():
        return
    groups = found[order][1:][is_repeat]
    members = np.flatnonzero(np.isin(found, groups))
    first = found[members[0]]
    same = rows[members[found[members] == first]].tolist()
    named = [_locate(planned, column, row, process) for row in same[:_MAX_NAMED]]
    places = ", ".join(place for _, place in named) + (", ..." if len(same) > _MAX_NAMED else "")
    num_ids = len(np.unique(groups))
    more = f" ({num_ids} ids repeat in all)" if num_ids > 1 else ""
    raise BadInput(
        f"{column} {named[0][0]} appears {len(same)} times: {places}{more}; make ids unique, or set "
        "input.on_duplicate_id to allow"
    )


def _locate(planned: PlannedInput, column: str, row: int, process: FeedProcess) -> tuple[str, str]:
    """Return a row's id and its place, as people would look it up."""
    files = planned.files
    local = next(
        item
        for item in files
        if item.file.row_start <= row < item.file.row_start + item.file.num_rows
    )
    own = row - local.file.row_start
    request = {"op": "locate", "path": str(local.path), "name": local.file.uri}
    told = process.ask_file({**request, "row": own, "column": column})
    where = f"line {told['line']}" if told["line"] is not None else f"row {own}"
    if len(files) > 1:
        where = f"{local.file.uri} {where}"
    return repr(told["value"])[:_MAX_ID_CHARS], where
