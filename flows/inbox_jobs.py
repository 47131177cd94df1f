"""Jobs for an inbox: the inbox's own job file, and what is given beside a dropped file, over it.

Who may drop a file need not own the machines. So the settings beside a file say what is asked of the
model, and not where and how it runs: stores, credentials, commands, local files are the inbox's own.
"""

import json
from dataclasses import dataclass
from typing import Any

from flows.config import JobError, dump_job, load_job, read_values
from flows.yaml_text import YamlError, parse_yaml
from storage.object_store import StorageConfig
from tasks.job import RunConfig

_OURS = (
    "storage",
    "metrics",
    "input.uri",
    "run_id",
    "reuse_from",
    "hardware.provider",
    "hardware.placement",
    "model.allowed_code",
    "hardware.stage_to",
    "hardware.stage_budget",
    "hardware.file",
    "hardware.gpus",
)


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
        """Read the settings beside a file.

        Raises:
            JobError: no mapping, or one that sets what is the inbox's own to set.
        """
        try:
            values = parse_yaml(data.decode("utf-8-sig"))
        except (YamlError, UnicodeDecodeError) as error:
            raise JobError(f"not YAML: {error}") from error
        if not isinstance(values, dict):
            raise JobError("expected a mapping of settings")
        self._refuse_what_is_ours(values)
        return values

    def _refuse_what_is_ours(self, values: dict[str, Any]) -> None:
        for path in _OURS:
            if _at(values, path) is not None:
                raise JobError(f"{path}: only the inbox's own job may set it; leave it out")
        template = _at(values, "input.chat_template")
        if template not in (None, "auto", "none"):
            raise JobError(
                "input.chat_template: only the inbox's own job may name a file; give auto or none"
            )
        source = _at(values, "model.source")
        is_local = not str(source).startswith(("s3://", "hf://"))
        if source not in (None, _at(self.base, "model.source")) and is_local:
            raise JobError("model.source: only the inbox's own job may name a folder here")
        root = str(_at(self.base, "output.uri")).rstrip("/")
        for path in ("output.uri", "output.history"):
            place = _at(values, path)
            parts = str(place).removeprefix(f"{root}/").split("/")
            if place is not None and (not str(place).startswith(f"{root}/") or ".." in parts):
                raise JobError(f"{path}: must be below the inbox's own, {root}/")

    def job(self, settings: dict[str, Any]) -> RunConfig:
        """Put settings over the inbox's own job, section by section. Raises JobError."""
        return load_job(_merged(self.base, settings))

    def dump(self, job: RunConfig) -> bytes:
        """Write a job file: JSON, which is YAML."""
        return json.dumps(dump_job(job), indent=1).encode()


def _at(values: Any, path: str) -> Any:
    """Return what is set under a dotted path; None if nothing is."""
    for step in path.split("."):
        values = values.get(step) if isinstance(values, dict) else None
    return values


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        is_both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merged(below or {}, value) if is_both else value
    return merged
