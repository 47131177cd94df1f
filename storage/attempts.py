"""Attempts: who tried a shard, for which revision, and how it went.

    _attempts/00042/003/attempt.json          create-only: the claim on the number
    _attempts/00042/003/completions.parquet   the data, whole before the commit
    _attempts/00042/003/failed.json           what went wrong, once it did

Numbers grow per shard and are never used twice, so two attempts never write the same key.
"""

import json
import secrets
from dataclasses import dataclass

from storage import keys
from storage.clock import Clock, SystemClock, timestamp
from storage.errors import AlreadyExists, CorruptObject, NotFound
from storage.failpoints import failpoint
from storage.manifest import FORMAT, Json, to_json
from storage.object_store import ObjectStore

ATTEMPT = "attempt.json"
PART = "completions.parquet"
FAILED = "failed.json"
_MAX_MESSAGE = 2_000  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt ended without a commit."""

    error: str
    """Class name of the exception."""

    message: str
    retryable: bool
    failed_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try at one shard by one holder."""

    shard_id: int
    attempt: int
    revision: int
    """The only revision it may commit."""

    invocation: str
    """Which start of the run it belongs to; tries are bounded per invocation."""

    holder: str
    claimed_at: str
    failure: Failure | None
    """None while it runs, after it committed, and when its process was killed."""


def claim_attempt(
    store: ObjectStore,
    shard_id: int,
    invocation: str,
    holder: str,
    *,
    revision: int = 1,
    after: int | None = None,
    clock: Clock | None = None,
) -> int:
    """Take the shard's next attempt number and return it; nobody else ever gets it.

    Args:
        revision: The commit revision this attempt is for; `commit_attempt` refuses another.
        after: The highest number known, of `attempts_of`; None to look.
    """
    claim = {
        "format": FORMAT,
        "shard_id": shard_id,
        "revision": revision,
        "invocation": invocation,
        "holder": holder,
        "claimed_at": timestamp(clock or SystemClock()),
        "nonce": secrets.token_hex(16),
    }
    number = _last_number(store, shard_id) if after is None else after
    while True:
        number += 1
        try:
            store.put_if_absent(
                keys.attempt(shard_id, number, ATTEMPT), to_json({**claim, "attempt": number})
            )
        except AlreadyExists:
            continue
        failpoint("after_claim")
        return number


def record_failure(
    store: ObjectStore,
    shard_id: int,
    attempt: int,
    error: BaseException,
    *,
    retryable: bool | None = None,
    clock: Clock | None = None,
) -> None:
    """Write down why an attempt of ours ended. The message must hold no prompt text.

    Args:
        retryable: Whether trying again can help; None: as the error's own type says.
    """
    if retryable is None:
        retryable = bool(getattr(error, "retryable", False))
    failure = {
        "format": FORMAT,
        "error": type(error).__name__,
        "message": str(error)[:_MAX_MESSAGE],
        "retryable": retryable,
        "failed_at": timestamp(clock or SystemClock()),
    }
    store.put(keys.attempt(shard_id, attempt, FAILED), to_json(failure))


def attempts_of(store: ObjectStore, shard_id: int) -> list[Attempt]:
    """Return the shard's attempts by number: one listing and a read or two for each."""
    found = (keys.parse_attempt(info.key) for info in store.list(_folder(shard_id)))
    names: dict[int, set[str]] = {}
    for key in found:
        if key is not None:
            names.setdefault(key.attempt, set()).add(key.name)
    attempts = (
        read_attempt(store, shard_id, number, failed=FAILED in names[number])
        for number in sorted(names)
        if ATTEMPT in names[number]
    )
    return [attempt for attempt in attempts if attempt is not None]


def read_attempt(
    store: ObjectStore, shard_id: int, number: int, *, failed: bool = False
) -> Attempt | None:
    """Read one claim, and its failure if asked to; None when it is gone.

    Raises:
        CorruptObject: it is not what `claim_attempt` writes.
    """
    claim = _read(store, keys.attempt(shard_id, number, ATTEMPT))
    if claim is None:
        return None
    failure = _read(store, keys.attempt(shard_id, number, FAILED)) if failed else None
    try:
        claim.pop("nonce")
        return Attempt(**claim, failure=None if failure is None else Failure(**failure))
    except (TypeError, KeyError) as error:
        raise CorruptObject(f"attempt {number} of shard {shard_id}: {error}") from error


def _read(store: ObjectStore, key: str) -> Json | None:
    try:
        value = json.loads(store.get(key))
        if value.pop("format") != FORMAT:
            raise CorruptObject(
                f"{key}: written by another Nightjar; this one reads format {FORMAT}"
            )
    except NotFound:
        return None
    except (ValueError, AttributeError, KeyError) as error:
        raise CorruptObject(f"{key}: not a JSON object of ours: {error}") from error
    return dict(value)


def _last_number(store: ObjectStore, shard_id: int) -> int:
    found = (keys.parse_attempt(info.key) for info in store.list(_folder(shard_id)))
    return max((key.attempt for key in found if key is not None), default=0)


def _folder(shard_id: int) -> str:
    return f"{keys.ATTEMPTS}{keys.shard_name(shard_id)}/"
