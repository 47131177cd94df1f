"""Run whole jobs through the command line's own entry and read back what a user would read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from flows.cli import main

DATA = Path(__file__).parent / "data"
CASES = DATA / "cases"
MODELS = DATA / "models"


@dataclass(frozen=True)
class Finished:
    """One `nightjar` call: its exit code, what it printed, and its run folder if there is one."""

    code: int
    out: str
    err: str
    run: Path | None

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out.strip().splitlines()[-1])

    @property
    def table(self) -> pa.Table:
        assert self.run is not None, self.err
        parts = sorted((self.run / "completions").glob("part-*.parquet"))
        return pa.concat_tables([pq.read_table(part) for part in parts])

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.table.to_pylist()

    def by_id(self, column: str = "id") -> dict[Any, dict[str, Any]]:
        found = {row[column]: row for row in self.rows}
        assert len(found) == len(self.rows), "an id is there twice"
        return found


class Nightjar:
    """Calls `nightjar` in this process, with job files in a folder of the test's own."""

    def __init__(self, folder: Path, capsys: Any) -> None:
        self.folder = folder
        self._capsys = capsys
        self._num_jobs = 0

    def call(self, *args: str) -> Finished:
        """Run one command; its run folder is only told when it is a local one."""
        self._capsys.readouterr()
        code = main([*args])
        out, err = self._capsys.readouterr()
        run = None
        if out.strip() and out.strip().splitlines()[-1].startswith("{"):
            named = json.loads(out.strip().splitlines()[-1]).get("run")
            run = Path(named) if named and "://" not in named else None
        return Finished(code, out, err, run)

    def job(self, model: str, uri: Any, **settings: Any) -> Path:
        """Write a job file; `settings` are dotted names with `__` for the dot."""
        job: dict[str, Any] = {
            "name": "case",
            "model": {"source": str(MODELS / model), "dtype": "float32"},
            "input": {"uri": [str(u) for u in uri] if isinstance(uri, list) else str(uri)},
            "output": {"uri": str(self.folder / "out")},
            "sampling": {"max_tokens": 8, "temperature": 0.0},
            "engine": {"backend": "transformers"},
        }
        for name, value in settings.items():
            section, _, key = name.partition("__")
            if key:
                job.setdefault(section, {})[key] = value
            else:
                job[section] = value
        self._num_jobs += 1
        path = self.folder / f"job-{self._num_jobs}.yaml"
        path.write_text(yaml.safe_dump(job, allow_unicode=True))
        return path

    def run(self, model: str, uri: Any, **settings: Any) -> Finished:
        return self.call("run", str(self.job(model, uri, **settings)), "--json")


def expected(case: str) -> Any:
    """Return a case's stated right values."""
    return json.loads((CASES / case / "case.json").read_text())["expect"]
