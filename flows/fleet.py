"""Replicas as Prefect flow runs of a `generate-shards` deployment: the fleet that waves are made of."""

import logging
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, TypeVar, cast
from uuid import UUID

from httpx import HTTPError
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelling

from storage.object_store import StorageConfig
from tasks.cancel import cancel
from tasks.job_variables import ProvisionError, check_job_variables
from tasks.run_folder import open_run

log = logging.getLogger("nightjar.fleet")

T = TypeVar("T")

_PAUSES_S = (1, 2, 5, 10, 20)
"""Between tries of a call to the server: a loaded one answers 503, one that restarts not at all."""


_CANCELLING_S = 300.0
"""After so long a flow run that is being cancelled is taken for over: Prefect leaves one whose process ended
between its two states in the first of them for ever."""

_MAX_CHARS = 500
"""Of what a platform says: an API server quotes whole manifests."""

_STORAGE = ("endpoint_url", "region", "profile")
"""Parameters of a replica that say how to reach its run's store."""


class PrefectFleet:
    """The replicas of one start; their states are hints, and only asked for to count them."""

    def __init__(
        self,
        *,
        deployment: str,
        parameters: dict[str, Any],
        run_id: str,
        parent_id: str,
        job_variables: Callable[[int], dict[str, Any]],
    ) -> None:
        """Check everything that Prefect would drop or find out late.

        Args:
            deployment: `generate-shards/...`.
            parameters: Of each replica: `generate_shards`'s own.
            run_id: Tag of each replica.
            parent_id: The flow run that owns them; a tag, by which its hooks find them.
            job_variables: Of the replica with a running number.

        Raises:
            ProvisionError: no such deployment, or a variable its work pool does not know.
        """
        self._deployment = deployment
        self._parameters = parameters
        self._tags = [f"run:{run_id}", owner_tag(parent_id)]
        self._key = f"{run_id}:{parameters['invocation']}"
        self._job_variables = job_variables
        self._ids: list[UUID] = []
        check_deployment(deployment, job_variables(0))

    def launch(self, wave: int, count: int) -> None:
        """Start `count` replicas; safe to repeat by the idempotency key."""
        for index in range(count):
            variables = self._job_variables(len(self._ids))
            key = f"{self._key}:w{wave}:r{index}"

            def start(key: str = key, variables: dict[str, Any] = variables) -> FlowRun:
                started = run_deployment(
                    self._deployment,
                    parameters=self._parameters,
                    job_variables=variables,
                    tags=self._tags,
                    idempotency_key=key,
                    timeout=0,
                )
                return cast("FlowRun", started)

            self._ids.append(patiently(start).id)

    def num_live(self) -> int:
        """Replicas whose flow run is not over; one that the server has forgotten is over."""
        return sum(not is_left_cancelling(run.state) for run in self._unfinished())

    def num_running(self) -> int:
        """Replicas that Prefect takes for running."""
        return sum(run.state is not None and run.state.is_running() for run in self._unfinished())

    def last_words(self) -> str | None:
        """What Prefect has of the replica that failed last, such as a platform's refusal."""
        runs = read_flow_runs(FlowRunFilter(id=FlowRunFilterId(any_=self._ids)))
        ended = [(run.state, run.name) for run in runs if run.state is not None]
        failed = [
            (s.timestamp, name, s.message) for s, name in ended if s.is_failed() or s.is_crashed()
        ]
        if not failed:
            return None
        _, name, message = max(failed, key=lambda found: found[0])
        return f"flow run {name}: {' '.join((message or 'no reason given').split())[:_MAX_CHARS]}"

    def dismiss(self) -> None:
        """Cancel every replica that has not started."""
        runs = self._unfinished()
        cancel_flow_runs(run for run in runs if run.state is None or not run.state.is_running())

    def cancel(self) -> None:
        """Cancel every replica that is not over."""
        cancel_flow_runs(self._unfinished())

    def _unfinished(self) -> list[FlowRun]:
        if not self._ids:
            return []
        return read_unfinished(FlowRunFilter(id=FlowRunFilterId(any_=self._ids)))


def is_left_cancelling(state: State | None) -> bool:
    """Whether a flow run has been in Cancelling for longer than any replica takes to stop."""
    if state is None or not state.is_cancelling():
        return False
    return (datetime.now(UTC) - state.timestamp).total_seconds() > _CANCELLING_S


def owner_tag(parent_id: str) -> str:
    """Return the tag of all replicas that a flow run started."""
    return f"owner:{parent_id}"


def stop_replicas_of(parent_id: str) -> None:
    """Cancel the replicas of a flow run that ended, through Prefect and through the store."""
    tags = FlowRunFilterTags(all_=[owner_tag(parent_id)])
    found = read_unfinished(FlowRunFilter(tags=tags))
    starts = {
        tuple(run.parameters[name] for name in ("run_uri", "invocation", *_STORAGE))
        for run in found
    }
    for uri, invocation, *storage in starts:
        given = StorageConfig(**dict(zip(_STORAGE, storage, strict=True)))
        cancel(open_run(uri, given).store, invocation)
    cancel_flow_runs(found)


def read_unfinished(which: FlowRunFilter) -> list[FlowRun]:
    """Return the flow runs that are not over."""
    return [run for run in read_flow_runs(which) if run.state is None or not run.state.is_final()]


def read_flow_runs(which: FlowRunFilter) -> list[FlowRun]:
    """Return all flow runs that a filter finds, page by page."""

    def read() -> list[FlowRun]:
        found: list[FlowRun] = []
        with get_client(sync_client=True) as client:
            while True:
                page = client.read_flow_runs(flow_run_filter=which, limit=200, offset=len(found))
                found += page
                if len(page) < 200:
                    return found

    return patiently(read)


def cancel_flow_runs(runs: Iterable[FlowRun]) -> None:
    """Ask for the end of flow runs; one that has ended meanwhile is no fault."""
    for run in runs:

        def stop(run_id: UUID = run.id) -> None:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(run_id, Cancelling())

        patiently(stop)


def check_deployment(name: str, job_variables: dict[str, Any]) -> None:
    """Refuse a deployment that is not there, and variables that its pool's template does not know.

    Raises:
        ProvisionError: says what is missing and how to get it.
    """

    def read() -> dict[str, Any]:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(name)
            if deployment.work_pool_name is None:
                raise ProvisionError(f"deployment {name} has no work pool; run `nightjar deploy`")
            pool = client.read_work_pool(deployment.work_pool_name)
            return dict(pool.base_job_template)

    try:
        template = patiently(read)
    except ObjectNotFound:
        raise ProvisionError(
            f"Prefect has no deployment {name}; run `nightjar deploy` to set it up"
        ) from None
    check_job_variables(job_variables, template)


def patiently(call: Callable[[], T]) -> T:
    """Call the server, and call again when it is out of reach or overloaded."""
    for pause_s in _PAUSES_S:
        try:
            return call()
        except PrefectHTTPStatusError as error:
            if error.response.status_code < 500 and error.response.status_code != 429:
                raise
            log.warning("Prefect answered %d; trying again", error.response.status_code)
        except HTTPError as error:
            log.warning("Prefect is out of reach (%s); trying again", type(error).__name__)
        time.sleep(pause_s)
    return call()
