"""A run in Prefect's own pages: a progress bar and a table of numbers, kept up to date.

Numbers, names of states and moments only; nothing of a row. A server that does not answer costs the
picture, never the run.
"""

import json
import logging
import re
import time
from collections import Counter
from typing import Any
from uuid import UUID

from httpx import HTTPError
from prefect import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from storage import records
from storage.errors import StorageError
from storage.object_store import ObjectStore
from tasks.progress import Progress
from tasks.watch import Look, look_at

log = logging.getLogger("nightjar.artifacts")

EVERY_S = 10.0
"""Between two updates; each costs the server two writes."""


class RunArtifacts:
    """The progress and the table of one flow run. Made in the flow's thread, shown from any."""

    def __init__(self, run_id: str, notes: Progress | None = None) -> None:
        """`notes`: whose notes to log, where nobody else shows them."""
        self._notes = notes
        self._slug = re.sub(r"[^a-z0-9]+", "-", run_id.lower()).strip("-")
        self._flow_run_id = UUID(str(flow_run.id))
        self._logger = get_run_logger()
        self._ids: dict[str, UUID] = {}
        self._shown_at = -EVERY_S
        self._warning: str | None = None

    def show(self, look: Look) -> None:
        """Bring both up to date, at most every `EVERY_S` seconds; log a warning when it begins."""
        warning = look.outlook.warning
        if warning and not self._warning:
            self._logger.warning("%s", warning)
        self._warning = warning
        self._log_notes()
        if time.monotonic() - self._shown_at >= EVERY_S:
            self._draw(look)

    def finish(self, store: ObjectStore) -> None:
        """Show how the run ended, at once."""
        self._log_notes()
        try:
            found = look_at(store)
        except StorageError as error:
            log.warning("no last look: %s", error)
            return
        for pause_s in (0.0, 1.0, 2.0):  # a loaded server answers the second time
            time.sleep(pause_s)
            if found is None or self._draw(found):
                return

    def _log_notes(self) -> None:
        for note in self._notes.take_notes() if self._notes else ():
            if not note.startswith("warning: "):  # said already
                self._logger.info("%s", note)

    def _draw(self, look: Look) -> bool:
        self._shown_at = time.monotonic()
        done = sum(commit.part.num_rows for commit in look.commits.values())
        share = 100.0 * done / max(1, look.plan.num_rows * look.plan.num_samples)
        rows = [{"what": name, "value": value} for name, value in table_of(look)]
        try:
            self._put("progress", round(share, 2), "rows committed, in per cent")
            self._put("table", json.dumps(rows), "the run so far, over all replicas")
        except (HTTPError, PrefectException) as error:
            log.warning("artifacts not updated: %s", type(error).__name__)
            if isinstance(error, ObjectNotFound):
                self._ids.clear()  # the server has lost its database
            return False
        return True

    def _put(self, kind: str, data: Any, description: str) -> None:
        # Once, not for a minute: the run does not wait for a server that is away.
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(sync_client=True) as client,
        ):
            if kind in self._ids:
                client.update_artifact(self._ids[kind], ArtifactUpdate(data=data))
                return
            made = client.create_artifact(
                ArtifactCreate(
                    key=f"{kind}-{self._slug}",
                    type=kind,
                    description=description,
                    data=data,
                    flow_run_id=self._flow_run_id,
                )
            )
            self._ids[kind] = made.id


def table_of(look: Look) -> list[tuple[str, str]]:
    """Return what is known of a run under way, as name and value."""
    outlook, commits = look.outlook, look.commits.values()
    states: Counter[str] = Counter()
    for commit in commits:
        states.update(commit.counts)
    reused = sum(commit.receipt.get("num_reused_rows") or 0 for commit in commits)
    wanted = look.plan.num_rows * look.plan.num_samples
    found = [
        ("rows", f"{sum(states.values()):,} of {wanted:,}"),
        ("shards", f"{len(look.commits):,} of {look.plan.num_shards:,}"),
        *((state, f"{states[state]:,}") for state in records.STATES if states[state]),
        ("replicas", str(outlook.num_replicas if outlook.is_running else 0)),
    ]
    optional: list[tuple[str, str | None]] = [
        ("copied from earlier runs", f"{reused:,}" if reused else None),
        ("tokens/s", _number(outlook.completion_tokens_per_s)),
        ("finish, even odds", outlook.finish_p50),
        ("finish, nine in ten", outlook.finish_p90),
        ("deadline", outlook.deadline),
        ("spent, $", _number(outlook.usd)),
        ("in all, nine in ten, $", _number(outlook.usd_p90)),
        ("warning", outlook.warning),
        ("as of", outlook.at),
    ]
    return found + [(name, value) for name, value in optional if value is not None]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:,.2f}"
