"""One job of many shards for replicas on a work pool, and what a test sees of its run."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from flows.cli import main
from tests.prefect_server import PrefectLab, wait_for

MARKER = "wombat-2b90-marker"
NUM_ROWS, NUM_SHARDS = 80, 40

# Fifty milliseconds at each of these moments of a shard: a run long enough to be interrupted.
STEPS = (
    *("after_lease", "after_claim", "before_commit", "after_copy"),
    *("local_before_link", "local_after_link", "local_before_rename"),
)
SLOW = {"NIGHTJAR_FAILPOINT": ",".join(f"{name}:sleep:1:1" for name in STEPS)}


class Case:
    """One job of 80 rows in 40 shards, by default for two process replicas, in a folder of its own."""

    def __init__(self, folder: Path, *, num_rows: int = NUM_ROWS, **hardware: Any) -> None:
        self.folder = folder
        self.num_shards = num_rows * NUM_SHARDS // NUM_ROWS
        texts = [f"{MARKER} tell me {row} things" for row in range(num_rows)]
        pq.write_table(pa.table({"id": range(num_rows), "prompt": texts}), folder / "in.parquet")
        defaults = {"provider": "process", "replicas": 2, "placement": {"env": SLOW}}
        self.values: dict[str, Any] = {
            "name": "case",
            "model": {"source": "none"},
            "input": {"uri": str(folder / "in.parquet"), "prompt_column": "prompt"},
            "output": {"uri": str(folder / "out")},
            "sampling": {"max_tokens": 8},
            "shards": {"max_rows": NUM_ROWS // NUM_SHARDS},
            "engine": {"backend": "dummy"},
            "hardware": {**defaults, **hardware},
        }
        self.job = folder / "job.yaml"
        self.write()

    def write(self) -> None:
        """Write the job file; again after a change of `values`."""
        self.job.write_text(yaml.safe_dump(self.values))

    @property
    def parameters(self) -> dict[str, object]:
        return {"job": str(self.job)}

    def start(self, lab: PrefectLab, deployment: str = "adhoc", **more: Any) -> str:
        return lab.run_deployment(f"batch-generate/{deployment}", self.parameters, **more)

    @property
    def run(self) -> Path:
        (found,) = (self.folder / "out").glob("case-*")
        return found

    def num_commits(self) -> int:
        return len(list((self.folder / "out").glob("case-*/commits/*.json")))

    def holders(self) -> set[int]:
        """Process ids that hold a lease."""
        leases = self.run.glob("_leases/0*.json")
        names = [json.loads(path.read_text())["holder"] for path in leases]
        return {int(name.split("/")[2]) for name in names if name}

    def is_whole(self) -> bool:
        return main(["verify", str(self.run), "--json"]) == 0

    def wait_for_work(self, num_replicas: int = 2, *, timeout_s: float = 240) -> None:
        """Wait until so many replicas hold shards and some are committed."""

        def is_reached() -> bool:
            return self.num_commits() >= 2 and len(self.holders()) >= num_replicas

        wait_for(is_reached, f"{num_replicas} replicas at work", timeout_s)

    def wait_until_published(self, lab: PrefectLab, run_id: str, *, timeout_s: float) -> None:
        """Wait for the flow run's end; published and verified, or the test fails."""
        done = lab.wait_for_state(run_id, timeout_s=timeout_s)
        assert done["state_type"] == "COMPLETED", f"{done['state']['message']}\n{lab.logs()}"
        assert self.is_whole()


def replicas(lab: PrefectLab, parent_id: str) -> list[dict[str, Any]]:
    where = {"flow_runs": {"tags": {"all_": [f"owner:{parent_id}"]}}}
    return list(lab.api("/flow_runs/filter", where))


def ended_replicas(lab: PrefectLab, parent_id: str) -> list[dict[str, Any]]:
    """The replicas of a flow run once all have ended; empty before."""
    ended = ("CANCELLED", "COMPLETED", "CRASHED", "FAILED")
    found = replicas(lab, parent_id)
    return found if all(run["state_type"] in ended for run in found) else []
