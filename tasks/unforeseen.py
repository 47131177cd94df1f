"""Errors of kinds nobody expects where they come from: an attempt ends typed, told by their kind and place.

Not by their own words, which may quote the row a library choked on.
"""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inference.errors import EngineFault, InferenceError
from storage.errors import StorageError
from tasks.stop import Stopped

log = logging.getLogger("nightjar.fault")


class ShardFault(Exception):
    """An attempt at a shard ended by a fault of Nightjar's own; another may succeed, a bounded number of times."""


def told(error: BaseException) -> str:
    """Say in one line what came up and where; the way there goes to the log."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    kind = type(error).__name__
    log.error("%s at %s", kind, " > ".join(places))
    where = places[-1] if places else "an unknown place"
    return f"{kind} at {where}: a fault of Nightjar's own; see the log"


@contextmanager
def engine_faults() -> Iterator[None]:
    """Make an error that no backend announces one of the engine, so that it costs an attempt and not the replica.

    Raises:
        EngineFault: told by the error's kind and place.
    """
    try:
        yield
    except (InferenceError, StorageError, Stopped):
        raise
    except Exception as error:
        raise EngineFault(told(error)) from error
