"""A replica that outlives runs: it joins one planned run after another, as a resident worker would.

usage: python -m tests.faults.soak_replica ENDPOINT_URL STEP_S

Run folders come on standard input, one a line; for each it drains until every shard is committed by
anybody, then prints one JSON line. A dummy engine takes STEP_S for a step, to be light on the CPU.
"""

import json
import logging
import sys
import time
from typing import Any

from flows.config import load_job
from inference.backends import create_backend
from inference.backends.dummy import DummyBackend
from inference.config import EngineConfig
from storage.errors import StorageError
from storage.object_store import StorageConfig, open_store
from tasks.drain import drain, new_invocation
from tasks.progress import Progress
from tasks.run import attach
from tasks.run_record import read_record
from tasks.scratch import scratch_folder
from tasks.stop import StopSignal

_PAUSE_S = 1.0


def main(endpoint_url: str, step_s: float) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")

    def build(config: EngineConfig) -> Any:
        if config.backend == "dummy":
            return DummyBackend(config, step_s=step_s)
        return create_backend(config)

    for line in sys.stdin:
        outcomes: dict[str, int] = {}
        num_outages = 0
        while True:
            try:
                for name, count in join(line.strip(), endpoint_url, build).items():
                    outcomes[name] = outcomes.get(name, 0) + count
                break
            except StorageError as error:
                if not error.retryable:
                    raise
                num_outages += 1
                print(f"joining again: {error}", file=sys.stderr, flush=True)
                time.sleep(_PAUSE_S)
        print(json.dumps({"run": line.strip(), **outcomes, "outages": num_outages}), flush=True)


def join(uri: str, endpoint_url: str, build: Any) -> dict[str, int]:
    """Drain one run until it is whole; return how this replica's attempts ended."""
    store = open_store(uri, StorageConfig(endpoint_url=endpoint_url))
    record = read_record(store)
    outcomes: dict[str, int] = {}
    progress = Progress()
    with scratch_folder() as work_dir:
        run = attach(load_job(record.job), record, store, work_dir=work_dir, progress=progress)
        try:
            while len(run.commits()) < run.plan.num_shards:
                report = drain(
                    run,
                    invocation=new_invocation(),
                    progress=progress,
                    should_stop=StopSignal(),
                    build_backend=build,
                )
                for name, count in report.outcomes.items():
                    outcomes[str(name)] = outcomes.get(str(name), 0) + count
                time.sleep(_PAUSE_S)
        finally:
            run.close()
    return outcomes


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
