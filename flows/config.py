"""Job files: YAML in, one frozen `RunConfig` out. The only place where YAML and pydantic meet.

Unknown keys are errors that name the nearest known key; `{date}` in `input.uri` and `output.uri` is
the run's day in the job's timezone.
"""

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from flows.job_checks import JobError as JobError
from flows.job_checks import check_job
from flows.job_checks import clipped as clipped
from flows.yaml_text import YamlError, parse_yaml
from inference.errors import EngineConfigError, printable
from storage.errors import NotFound
from storage.object_store import StorageConfig, open_store
from tasks.hardware import hardware_of, read_hardware
from tasks.job import RunConfig

_SECRET = re.compile(r"(?i)token|secret|passw|credential|(api|access|private)_?key")
_DATE = re.compile(r"\{date(?::([^{}]*))?\}")


def load_job(
    source: Path | str | dict[str, Any],
    *,
    overrides: Sequence[str] = (),
    now: datetime | None = None,
) -> RunConfig:
    """Read a job file (or its parsed content), apply `a.b=c` overrides and check every field.

    Raises:
        JobError: unreadable YAML, an unknown key, a missing or ill-typed value.
    """
    values = source if isinstance(source, dict) else read_values(source)
    for override in overrides:
        values = _with_override(values, override)
    _refuse_unknown_keys(values, RunConfig, path="")
    job = _with_gpus(_build(values))
    check_job(job)
    return _with_dates(job, now or datetime.now(UTC))


def dump_job(job: RunConfig) -> dict[str, Any]:
    """Return plain data that `load_job` reads back to an equal job."""
    return dataclasses.asdict(job)


def read_values(source: Path | str) -> dict[str, Any]:
    """Read a job file's content, a path or `s3://`, without checking its keys. Raises JobError."""
    try:
        values = parse_yaml(_job_text(str(source)))
    except (FileNotFoundError, NotFound):
        raise JobError(f"job file {source}: not found; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"job file {source}: unreadable: {error}") from error
    except YamlError as error:
        raise JobError(f"job file {source}{error}") from error
    if not isinstance(values, dict):
        raise JobError(f"job file {source}: expected a mapping of settings, found {_kind(values)}")
    return values


def _job_text(source: str) -> str:
    if not source.startswith("s3://"):
        return Path(source).read_text(encoding="utf-8-sig")
    folder, _, name = source.rpartition("/")
    config = StorageConfig(endpoint_url=os.environ.get("AWS_ENDPOINT_URL"))
    return open_store(folder, config).get(name).decode("utf-8-sig")


def _with_override(values: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise JobError(f"--set {override}: write it as key=value, such as --set sampling.seed=7")
    try:
        value = parse_yaml(text) if text else ""
    except YamlError as error:
        raise JobError(
            f"--set {key}: the value is not YAML{error}; put it into quotes, such as "
            f"""--set '{key}="TEXT"'"""
        ) from error
    return _replaced(values, key.split("."), value, key)


def _replaced(values: Any, steps: list[str], value: Any, key: str) -> dict[str, Any]:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise JobError(f"--set {key}: {_kind(values)} in the job file has no keys below it")
    first, rest = steps[0], steps[1:]
    below = _replaced(values.get(first), rest, value, key) if rest else value
    return {**values, first: below}


def _refuse_unknown_keys(values: Any, cls: type, path: str) -> None:
    if not isinstance(values, dict):
        raise JobError(f"{path or 'job'}: expected a mapping of settings, found {_kind(values)}")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise JobError(f"{printable(name)[:200]}: unknown key; {_nearest(str(key), known)}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(hints[key], type):
            if value is None:
                raise JobError(f"{name}: expected a mapping of settings, found nothing")
            _refuse_unknown_keys(value, hints[key], name)


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys are {', '.join(known)}"


def _build(values: dict[str, Any]) -> RunConfig:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        raise JobError(_first_problem(error.errors())) from error


def _first_problem(problems: Sequence[Any]) -> str:
    """One line on the first field that is wrong; union members of pydantic's path are dropped."""
    problem = problems[0]
    if problem["type"] == "value_error":  # of a check of ours, which names its field
        return str(problem["ctx"]["error"])
    steps = [str(step) for step in problem["loc"]]
    path = _field_path(steps)
    if problem["type"] == "missing":
        return f"{path}: missing; add it to the job file or give --set {path}=VALUE"
    expected = [p["msg"] for p in problems if _field_path([str(s) for s in p["loc"]]) == path]
    rule = " or ".join(dict.fromkeys(text[0].lower() + text[1:] for text in expected))
    return f"{path}: got {clipped(problem['input'])}; {rule[:300]}"


def _field_path(steps: list[str]) -> str:
    cls: Any = RunConfig
    path: list[str] = []
    for step in steps:
        if not (dataclasses.is_dataclass(cls) and isinstance(cls, type)):
            break
        hints = typing.get_type_hints(cls)
        if step not in hints:
            break
        path.append(step)
        cls = hints[step]
    return ".".join(path) or "job"


def _with_gpus(job: RunConfig) -> RunConfig:
    """Read `hardware.file`, where there is one, into `hardware.gpus`, or check those that are given."""
    config = job.hardware
    setting = "gpus" if config.file is None else "file"
    try:
        if config.file is not None:
            config = dataclasses.replace(config, file=None, gpus=read_hardware(config.file))
        elif config.gpus is not None:
            hardware_of(config)
    except EngineConfigError as error:
        raise JobError(f"hardware.{setting}: {error}") from error
    return dataclasses.replace(job, hardware=config)


def _with_dates(job: RunConfig, now: datetime) -> RunConfig:
    day = now.astimezone(ZoneInfo(job.timezone))

    def expand(uri: str) -> str:
        try:
            return _DATE.sub(lambda match: day.strftime(match[1] or "%Y-%m-%d"), uri)
        except ValueError as error:
            raise JobError(f"{clipped(uri)}: no date format: {error}") from error

    before, found, _ = job.output.uri.partition("{date")
    history = job.output.history
    if history is None and found:
        # Tomorrow's folder is another one: what is learnt tonight is kept above it.
        history = f"{before.rpartition('/')[0] or '.'}/_history"
    uri = job.input.uri
    expanded = expand(uri) if isinstance(uri, str) else [expand(item) for item in uri]
    return dataclasses.replace(
        job,
        input=dataclasses.replace(job.input, uri=expanded),
        output=dataclasses.replace(job.output, uri=expand(job.output.uri), history=history),
    )


def _kind(value: Any) -> str:
    names: dict[type, str] = {
        list: "a list",
        str: "text",
        int: "a number",
        float: "a number",
        bool: "true or false",
        type(None): "nothing",
    }
    return names.get(type(value), type(value).__name__)
