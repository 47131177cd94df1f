"""Open a run folder the way its own job asks: encrypted as it was begun, one writer if it was promised.

Whoever names a run says only where the store is; how its objects are written is in run.json.
"""

import dataclasses

from storage import keys
from storage.errors import NotFound
from storage.manifest import RunRecord
from storage.object_store import ObjectStore, StorageConfig, open_store
from tasks.job import job_of


def open_run_folder(uri: str, storage: StorageConfig) -> ObjectStore:
    """Open a run's store; endpoint, region and profile are the caller's, the rest is the run's.

    A folder without run.json is opened as it is: whoever needs the run says that it is none.

    Raises:
        StorageError: the store cannot be reached, or run.json cannot be read.
    """
    store = open_store(uri, storage)
    try:
        record = RunRecord.from_json(store.get(keys.RUN), source=f"{store.uri}/{keys.RUN}")
    except NotFound:
        return store
    asked = job_of(record).storage
    mine = dataclasses.replace(
        asked,
        endpoint_url=storage.endpoint_url,
        region=storage.region,
        profile=storage.profile,
    )
    return store if mine == storage else open_store(uri, mine)
