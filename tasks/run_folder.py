"""A run folder, opened the way its own record says.

What is given, on the command line or by the environment, reaches `run.json`; from there on the
storage section of the run's job holds, so that a retry uses the profile of the run and keeps its
promise of a single writer.
"""

import dataclasses
from typing import Any, NamedTuple

from storage.manifest import RunRecord
from storage.object_store import DEFAULT_STORAGE, ObjectStore, StorageConfig, open_store
from tasks.run_record import read_record


class RunFolder(NamedTuple):
    """A run that was begun."""

    store: ObjectStore
    record: RunRecord


def open_run(uri: str, given: StorageConfig = DEFAULT_STORAGE) -> RunFolder:
    """Open a run folder by its record's storage settings; what is given goes over them.

    Raises:
        BadInput: the folder is not a run's.
        StorageError: the profile that the record names is not known here, among others.
    """
    store = open_store(uri, given)
    record = read_record(store)
    storage = recorded_storage(record, given)
    return RunFolder(store if storage == given else open_store(uri, storage), record)


def recorded_storage(record: RunRecord, given: StorageConfig = DEFAULT_STORAGE) -> StorageConfig:
    """Return the storage settings of a run's job, with those that are given over them."""
    known = {field.name for field in dataclasses.fields(StorageConfig)}
    section: dict[str, Any] = record.job.get("storage") or {}
    recorded = {name: value for name, value in section.items() if name in known}
    over = {name: value for name, value in dataclasses.asdict(given).items() if value}
    return StorageConfig(**{**recorded, **over})
