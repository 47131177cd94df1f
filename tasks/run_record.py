"""What a run folder says of its run: its record, its plan and its shards, written once, read by everybody."""

import dataclasses
import json
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from storage import keys
from storage.errors import AlreadyExists, BadInput, CorruptObject, NotFound, StorageError
from storage.failpoints import failpoint
from storage.manifest import PlanManifest, RunRecord, Shard, digest
from storage.object_store import ObjectStore
from tasks.fingerprint import check_fingerprint, fingerprint, versions
from tasks.job import RunConfig
from tasks.plan_table import shards_from_bytes

_LOOK_AT = 1000  # objects: one request of a listing
_SHOWN = 3


def write_record(
    store: ObjectStore, job: RunConfig, run_id: str, fields: dict[str, Any]
) -> RunRecord:
    """Write run.json, once; return the record that stands.

    Raises:
        FingerprintMismatch: the folder is of a run with other settings.
    """
    record = RunRecord(
        run_id=run_id,
        name=job.name,
        fingerprint=fingerprint(fields),
        fingerprint_fields=fields,
        job=dataclasses.asdict(job),
        versions=versions(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        store.put_if_absent(keys.RUN, record.to_json())
    except AlreadyExists:
        standing = read_record(store)
        check_fingerprint(store.uri, standing.fingerprint_fields, fields)
        return standing
    failpoint("after_record")
    return record


def read_record(store: ObjectStore) -> RunRecord:
    """Read run.json, with the job as the latest start has it.

    Budget, deadline, canary and the like may differ from start to start; what can change a token cannot.

    Raises:
        BadInput: the folder is not a run's.
    """
    try:
        record = RunRecord.from_json(store.get(keys.RUN), source=f"{store.uri}/{keys.RUN}")
    except NotFound:
        found = _runs_below(store)
        there = f"; there are {', '.join(found)}" if found else ", such as OUTPUT_URI/RUN_ID"
        raise BadInput(f"{store.uri}: no run.json; give a run folder{there}") from None
    try:
        latest = store.get(keys.JOB)
    except NotFound:
        return record
    try:
        return dataclasses.replace(record, job=json.loads(latest))
    except ValueError:
        raise CorruptObject(
            f"{store.uri}/{keys.JOB}: not JSON; delete it, and the job of the first start holds"
        ) from None


def _runs_below(store: ObjectStore) -> list[str]:
    """Return a few run folders right below this one, found by a short look; for a message."""
    if "://" not in store.uri:  # a listing would open every file there
        below = sorted(path.parent for path in Path(store.uri).glob(f"*/{keys.RUN}"))
        return [str(folder) for folder in below[:_SHOWN]]
    try:
        listed = [info.key.split("/") for info in islice(store.list(), _LOOK_AT)]
    except StorageError:
        return []
    found = [f"{store.uri}/{key[0]}" for key in listed if key[1:] == [keys.RUN]]
    return found[:_SHOWN]


def planned(store: ObjectStore) -> PlanManifest:
    """Read the plan. Raises BadInput when the folder has none."""
    plan = load_plan(store)
    if plan is None:
        raise BadInput(f"{store.uri}: no plan.json; start the run with `nightjar run JOB` first")
    return plan


def load_plan(store: ObjectStore) -> PlanManifest | None:
    """Return the stored plan, or None if there is none yet.

    Raises:
        CorruptObject: plan.json cannot be read.
    """
    try:
        data = store.get(keys.PLAN)
    except NotFound:
        return None
    return PlanManifest.from_json(data, source=f"{store.uri}/{keys.PLAN}")


def load_shards(store: ObjectStore, plan: PlanManifest) -> list[Shard]:
    """Return the plan's shards.

    Raises:
        CorruptObject: plan.parquet is missing or not the one the plan names.
    """
    source = f"{store.uri}/{keys.PLAN_TABLE}"
    try:
        data = store.get(keys.PLAN_TABLE)
    except NotFound:
        raise CorruptObject(f"{source}: missing, though {keys.PLAN} is there") from None
    found = digest(data)
    if found != plan.table_digest:
        raise CorruptObject(f"{source}: is {found}, the plan names {plan.table_digest}")
    return shards_from_bytes(data, source=source)
