"""budget.usd: refuses a run before it starts, or lets it end cleanly before it costs more."""

import logging
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import ClassVar

from storage.commits import CommitCache, all_commits
from storage.errors import BadInput
from storage.object_store import ObjectStore
from tasks.forecast import Forecast
from tasks.job import RunConfig
from tasks.outlook import holders_of

log = logging.getLogger("nightjar.budget")

MOST_UNSEEN = 16
"""Claims of one replica without a look at the store, however much room there is."""


class BudgetSpent(Exception):
    """No further shard fits into the budget; what was begun is committed and the run resumes."""

    retryable: ClassVar[bool] = True


@dataclass(slots=True, kw_only=True)
class BudgetGate:
    """Asked before every claim, by every replica: does one more shard fit?

    Dollars are those of the receipts in the store, of all replicas and of earlier starts too. Shards that
    are held now are taken to cost what committed ones did on average. With `most_unseen` the store is not
    read for each while many more fit: those who hold shards claim a quarter of the room between them, then look.
    """

    store: ObjectStore
    usd: float | None
    reason: str | None = None
    """Why no further shard is claimed, once that is so."""

    most_unseen: int = 0
    """Most answers in a row without a look."""

    cache: CommitCache = field(default_factory=dict)
    """Commits known already, which are not read again."""

    _num_allowed: int = 0
    """Claims before the next look."""

    def allows(self) -> bool:
        """Whether another shard may be claimed. Raises StorageError."""
        if self.usd is None or self.reason is not None:
            return self.reason is None
        if self._num_allowed:
            self._num_allowed -= 1
            return True
        # Every revision cost its own; a shard is done by any of them.
        every = list(all_commits(self.store, cache=self.cache))
        commits = {commit.shard_id: commit for commit in every}
        prices = [commit.receipt.get("usd") for commit in every]
        spent = math.fsum(price for price in prices if price is not None)
        known = sum(price is not None for price in prices)
        if not known:
            return spent < self.usd
        held = sum(holders_of(self.store, commits, datetime.now(UTC)).values())
        each = spent / known
        if spent + (held + 1) * each <= self.usd:
            room = (self.usd - spent) / each - held - 1 if each else math.inf
            self._num_allowed = int(min(room / (4 * max(1, held)), self.most_unseen))
            return True
        self.reason = (
            f"budget.usd is {self.usd:.2f}: {spent:.4f} are spent on {len(commits)} shards, {held} "
            f"more are under way and the next would cost about {each:.4f}; raise the budget and "
            "run again to go on"
        )
        log.warning("%s", self.reason)
        return False


def check_budget(job: RunConfig, expected: Forecast) -> None:
    """Refuse a run that is forecast to cost more than it may.

    Raises:
        BadInput: with the forecast and what it rests on.
    """
    if job.budget.usd is None or expected.usd_p50 is None or expected.usd_p50 <= job.budget.usd:
        return
    raise BadInput(
        f"budget.usd is {job.budget.usd:.2f}, the forecast is {expected.usd_p50:.2f} to "
        f"{expected.usd_p90:.2f} ({expected.lengths.sentence}); raise the budget, lower "
        "sampling.max_tokens or send fewer rows"
    )
