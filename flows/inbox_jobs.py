"""Jobs for an inbox: the inbox's own job file, and what is given beside a dropped file, over it."""

import json
from dataclasses import dataclass
from typing import Any

from flows.config import JobError, dump_job, load_job, read_values
from flows.yaml_text import YamlError, parse_yaml
from storage.object_store import StorageConfig
from tasks.job import RunConfig


@dataclass(frozen=True, slots=True)
class InboxJobs:
    """Makes the job of each dropped file; see `tasks.inbox.Jobs`."""

    base: dict[str, Any]

    @classmethod
    def read(cls, source: str) -> "InboxJobs":
        """Read the inbox's own job file; it may lack `input.uri`. Raises JobError."""
        return cls(read_values(source))

    @property
    def any_job(self) -> RunConfig:
        """The inbox's job for some file. Raises JobError."""
        return self.job({"input": {"uri": "s3://inbox/any"}})

    @property
    def storage(self) -> StorageConfig:
        """How the inbox's job reaches object storage."""
        return self.any_job.storage

    def settings(self, data: bytes) -> dict[str, Any]:
        """Read the settings beside a file. Raises JobError."""
        try:
            values = parse_yaml(data.decode("utf-8-sig"))
        except (YamlError, UnicodeDecodeError) as error:
            raise JobError(f"not YAML: {error}") from error
        if not isinstance(values, dict):
            raise JobError("expected a mapping of settings")
        return values

    def job(self, settings: dict[str, Any]) -> RunConfig:
        """Put settings over the inbox's own job, section by section. Raises JobError."""
        return load_job(_merged(self.base, settings))

    def dump(self, job: RunConfig) -> bytes:
        """Write a job file: JSON, which is YAML."""
        return json.dumps(dump_job(job), indent=1).encode()


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        is_both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merged(below or {}, value) if is_both else value
    return merged
