"""What a job's types cannot say: which values mean nothing, contradict each other or must not be stored."""

import dataclasses
import json
import re
from operator import attrgetter
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from inference.errors import printable
from storage.endpoints import refuse_password
from storage.errors import BadInput
from storage.sizes import parse_bytes
from tasks.job import InputConfig, ModelConfig, OutputConfig, RunConfig

_SECRET = re.compile(r"(?i)token|secret|passw|credential|(api|access|private)_?key")
_AT_LEAST = {
    "shards.target_tokens": 1,
    "shards.max_rows": 1,
    "shards.max_attempts": 1,
    "engine.max_num_seqs": 1,
    "engine.max_num_batched_tokens": 1,
    "engine.max_model_len": 1,
    "engine.tensor_parallel_size": 1,
    "hardware.replicas": 1,
    "hardware.max_replicas": 1,
    "hardware.replica_minutes": 1,
    "canary.rows": 0,
    "max_failed_rows": 0,
}
_ABOVE_ZERO = (
    "budget.usd",
    "hardware.price_per_hour",
    "canary.max_length_factor",
    "canary.max_slowdown",
)
_SHARES = ("canary.max_error_rate", "canary.max_truncated_rate", "canary.max_repetitive_rate")
_MAX_PORT = 65_535
_DEFAULTS = RunConfig(
    model=ModelConfig(source=""), input=InputConfig(uri=""), output=OutputConfig(uri="")
)


class JobError(ValueError):
    """The job file is wrong; the message has the key, the value and what to change."""


def check_job(job: RunConfig) -> None:
    """Refuse what types cannot say.

    Raises:
        JobError: names the setting.
    """
    if job.model.trust_remote_code:
        raise JobError(
            "model.trust_remote_code: Python code from model folders is never run; remove the key "
            "and use a model class that transformers ships"
        )
    for digest in job.model.allowed_code:
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise JobError(
                f"model.allowed_code: {clipped(digest)} is no SHA-256; give 64 digits of 0-9a-f, as "
                "sha256sum prints them"
            )
    _check_prompt(job)
    _check_names(job)
    _check_amounts(job)
    _check_storage(job)
    _check_secrets(job)
    _check_storable(job)


def clipped(value: Any) -> str:
    """Return a value as one line of bounded length."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_prompt(job: RunConfig) -> None:
    sources = ("prompt", "prompt_column", "messages_column")
    given = [name for name in sources if getattr(job.input, name) is not None]
    if len(given) > 1:
        raise JobError(f"input: {' and '.join(given)} are both given; keep one of them")
    if job.input.tools_column is not None and given and given != ["messages_column"]:
        raise JobError(
            f"input.tools_column: tools go with messages, and {given[0]} is given; "
            "use messages_column, or leave it out"
        )
    try:
        job.sampling.params()
    except ValueError as error:
        raise JobError(f"sampling.{error}") from error


def _check_names(job: RunConfig) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", job.name):
        raise JobError(
            f"name: got {clipped(job.name)}; use letters, digits, '.', '_' and '-', at most 100"
        )
    if job.run_id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", job.run_id):
        raise JobError(f"run_id: got {clipped(job.run_id)}; use letters, digits, '.', '_' and '-'")
    uris = [job.input.uri] if isinstance(job.input.uri, str) else job.input.uri
    if not job.output.uri.strip():
        raise JobError("output.uri: empty; give a folder, file://, s3:// or memory://")
    if not all(uri.strip() for uri in uris):
        raise JobError("input.uri: empty; give a file, folder, glob or list")
    if not job.model.source.strip():
        raise JobError("model.source: empty; give a folder, s3://bucket/prefix/ or hf://ORG/REPO")
    try:
        ZoneInfo(job.timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:  # OSError: a folder of zones
        raise JobError(
            f"timezone: {clipped(job.timezone)} is not known; use a name such as Europe/Berlin"
        ) from error


def _check_amounts(job: RunConfig) -> None:
    """Refuse amounts that mean nothing."""

    def refuse(name: str, rule: str) -> JobError:
        value = attrgetter(name)(job)
        default = attrgetter(name)(_DEFAULTS)
        left_out = "none" if default is None else f"{default}, the default"
        return JobError(f"{name}: must be {rule}, got {value}; leave it out for {left_out}")

    for name, least in _AT_LEAST.items():
        value = attrgetter(name)(job)
        if isinstance(value, int) and value < least:
            raise refuse(name, f"at least {least}")
    for name in _ABOVE_ZERO:
        value = attrgetter(name)(job)
        if value is not None and not value > 0:
            raise refuse(name, "above 0")
    for name in _SHARES:
        value = attrgetter(name)(job)
        if value is not None and not 0 <= value <= 1:
            raise refuse(name, "a share from 0 to 1")
    try:
        parse_bytes(job.hardware.stage_budget, name="hardware.stage_budget")
    except BadInput as error:
        raise JobError(str(error)) from None
    port = job.metrics.port
    if port is not None and not 1 <= port <= _MAX_PORT:
        raise refuse("metrics.port", f"from 1 to {_MAX_PORT}")


def _check_storage(job: RunConfig) -> None:
    has_key = job.storage.kms_key_id is not None
    if has_key and job.storage.server_side_encryption in (None, "AES256"):
        raise JobError(
            "storage.kms_key_id: needs storage.server_side_encryption: aws:kms; add it, or leave out the key"
        )


def _check_secrets(job: RunConfig) -> None:
    """Refuse credentials in the job: it is kept in run.json and, for replicas, by Prefect."""
    if job.storage.endpoint_url is not None:
        try:
            refuse_password(job.storage.endpoint_url)
        except BadInput as error:
            raise JobError(str(error)) from None
    placement = job.hardware.placement
    more = placement.job_variables.get("env")
    for name in [*placement.env, *(more if isinstance(more, dict) else ())]:
        if _SECRET.search(name):
            raise JobError(
                f"hardware.placement: {printable(name)[:100]} looks like a credential, which would be "
                "recorded; set it where the worker runs, or in the pool's own template"
            )


def _check_storable(job: RunConfig) -> None:
    """Refuse what run.json could not give back unchanged: no number, or no text."""
    for name, value in dataclasses.asdict(job).items():
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JobError(
                f"{name}: has half a surrogate pair; write the whole character"
            ) from None
        except (TypeError, ValueError) as error:
            raise JobError(f"{name}: cannot be kept as JSON: {error}; leave it out") from None
