"""Asking for the next shard in another thread, so that an engine never waits for the store."""

import logging
import time
from collections.abc import Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from storage.errors import StorageError
from tasks.claims import Claim, Claims

log = logging.getLogger("nightjar.claiming")

_OUTAGE_S = 600.0  # as long as a finished shard waits for its store
_OUTAGE_PAUSE_S = 5.0


class Answer(NamedTuple):
    """What came of asking; without a claim there is none to be had now."""

    claim: Claim | None


@dataclass(slots=True, kw_only=True)
class Claiming:
    """One request at a time. A store that is away is put up with for a while: no model is loaded again."""

    claims: Claims
    threads: ThreadPoolExecutor
    may_claim: Callable[[], bool] = lambda: True
    """Asked before every claim; False ends the claiming for good."""

    future: Future[Claim | None] | None = None
    """The request under way."""

    _is_barred: bool = False
    _away_since: float | None = field(default=None)

    def makes_sense(self, without: Set[int]) -> bool:
        """Whether a shard that is not in `without` may be had and is not being asked for already."""
        if self.future is not None or self._is_barred:
            return False
        return self.claims.may_have_more(without)

    @property
    def pause_s(self) -> float | None:
        """How long to wait before asking again; None: there is nothing to wait for."""
        if self._is_barred:
            return None
        return _OUTAGE_PAUSE_S if self._away_since is not None else self.claims.backoff_s

    def ask(self, without: Set[int] = frozenset()) -> Future[Claim | None]:
        """Ask for a shard that is not in `without`, unless a request is under way; return that."""
        if self.future is None:
            self.future = self.threads.submit(self._claim, without)
        return self.future

    def answer(self) -> Answer | None:
        """Take the answer that has come; None while there is none.

        Raises:
            StorageError: no shard can be claimed, for a reason that does not pass.
        """
        if self.future is None or not self.future.done():
            return None
        future, self.future = self.future, None
        try:
            claim = future.result()
        except StorageError as error:
            self._store_is_away(error)
            return Answer(None)
        self._away_since = None
        return Answer(claim)

    def _claim(self, without: Set[int]) -> Claim | None:
        self._is_barred = not self.may_claim()
        return None if self._is_barred else self.claims.next(without)

    def _store_is_away(self, error: StorageError) -> None:
        now = time.monotonic()
        self._away_since = since = self._away_since or now
        if not error.retryable or now - since > _OUTAGE_S:
            raise error
        log.warning("no shard can be claimed now, trying again: %s", error)
        self.claims.look_again_in(_OUTAGE_PAUSE_S)
