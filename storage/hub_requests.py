"""Requests to the Hugging Face Hub: repeated a bounded number of times, and faults with types.

huggingface_hub repeats little by itself; hf-xet, which it leaves large files to, raises RuntimeError
for whatever goes wrong.
"""

import os
import random
import re
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from storage.disk_space import NO_SPACE
from storage.errors import AccessDenied, BadInput, NotFound, StorageError, StoreUnavailable

_PASSING = {408, 409, 429, 500, 502, 503, 504}
_MAX_ATTEMPTS = 6
_MAX_WAIT_S = 120.0
_XET_BOUNDS = {
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "500ms",
    "HF_XET_CLIENT_READ_TIMEOUT": "30s",
}
"""hf-xet 1.8 repeats by itself for 4 minutes where its store refuses and 9 or more where it is silent, and hears no
signal meanwhile: it is kept short, since whole requests are repeated here. What the user has set stays."""

Reply = TypeVar("Reply")


def bounded(request: Callable[[], Reply], what: str) -> Reply:
    """Ask a bounded number of times, waiting as long as the Hub says; `what` names the request in errors.

    Raises:
        NotFound, AccessDenied, BadInput, StoreUnavailable: as the Hub answered.
        OSError: the disk is full; its errno is one of `NO_SPACE`.
    """
    errors: Any = import_module("huggingface_hub.errors")
    os.environ.update(_XET_BOUNDS | os.environ)  # read when its first session begins
    waited_s = 0.0
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        try:
            return request()
        except errors.HfHubHTTPError as error:
            fault = _from_reply(error, what)
            wait_s = _retry_after_s(error, attempt)
        except (OSError, errors.HTTPError, RuntimeError) as error:  # HTTPError: no answer at all
            if (number := errno_of(error)) in NO_SPACE:
                raise OSError(number, str(error)) from error
            fault = StoreUnavailable(f"{what}: {type(error).__name__}: {error}")
            wait_s = _backoff_s(attempt)
        waited_s += wait_s
        if not fault.retryable or attempt == _MAX_ATTEMPTS or waited_s > _MAX_WAIT_S:
            break
        time.sleep(wait_s)
    later = ": try again when the Hub can be reached, or give a local folder"
    raise type(fault)(f"{fault}; asked {attempt} times{later if fault.retryable else ''}")


def errno_of(error: Exception) -> int | None:
    """What the system said; hf-xet tells it in its message alone, as Rust spells it."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else getattr(error, "errno", None)


def _retry_after_s(error: Any, attempt: int) -> float:
    header = error.response.headers.get("Retry-After", "") if error.response is not None else ""
    return float(header) + random.uniform(0, 0.5) if header.isdigit() else _backoff_s(attempt)


def _backoff_s(attempt: int) -> float:
    return random.uniform(0.5, 1.0) * min(15.0, 0.5 * 2.0 ** (attempt - 1))


def _from_reply(error: Any, what: str) -> StorageError:
    status = error.response.status_code if error.response is not None else 0
    said = str(error).splitlines()[0]
    if status == 404:
        return NotFound(f"{what}: no such repository, revision or file ({said})")
    if status in (401, 403):
        return AccessDenied(f"{what}: {said}; accept its licence or set HF_TOKEN")
    if status in _PASSING or status == 0:
        return StoreUnavailable(f"{what}: the Hub answers {status}: {said}")
    return BadInput(f"{what}: the Hub refuses: {status}: {said}")
