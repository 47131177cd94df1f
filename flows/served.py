"""Jobs that workers run. A flow run works in a folder that is thrown away: no path may be relative to it."""

from pathlib import Path

from flows.config import JobError
from tasks.job import RunConfig

_NOT_PATHS = ("none", "auto")


def check_paths(job: RunConfig) -> None:
    """Refuse a job with a relative path; what it wrote would be gone with the flow run.

    Raises:
        JobError: names the setting.
    """
    uris = [job.input.uri] if isinstance(job.input.uri, str) else job.input.uri
    named = [("model.source", job.model.source), ("output.uri", job.output.uri)]
    named += [("input.uri", uri) for uri in uris]
    named += [("output.history", job.output.history or "none")]
    named += [("input.chat_template", job.input.chat_template)]
    for name, text in named:
        if text not in _NOT_PATHS and not _is_fixed(text):
            raise JobError(
                f"{name}: {text} is relative, and a flow run has no folder that stays; write it as "
                f"{Path(text).absolute()} or as a URI such as s3://"
            )


def fixed(text: str) -> str:
    """Return a local path as workers on this machine find it; anything else as it is."""
    return text if _is_fixed(text) else str(Path(text).absolute())


def _is_fixed(text: str) -> bool:
    return "://" in text or text.startswith("pkg:") or Path(text).is_absolute()
