"""The pre-flight letter: what a dropped file holds, and whether and when it will be worked on.

It is the preflight of the file's own job, as `nightjar plan` shows it, with a verdict. Nothing is
written but the letter, by the caller.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from inference.errors import EngineConfigError
from storage.errors import BadInput
from storage.manifest import to_json
from tasks.job import RunConfig
from tasks.preflight import Preflight, preflight
from tasks.preflight_text import preflight_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """What the sender of a file is told."""

    file: str
    etag: str
    is_accepted: bool
    reason: str
    """Why it is accepted or not, and what to change."""

    preflight: Preflight | None = None
    """None when the file could not be read to its end."""

    queued_for: str | None = None
    """Not before this moment."""

    run_uri: str | None = None
    """Where the results will be."""

    def to_json(self) -> bytes:
        """Return the machine's copy."""
        return to_json({"format": 2, **dataclasses.asdict(self)})

    def to_markdown(self) -> bytes:
        """Return the reader's copy."""
        verdict = "accepted" if self.is_accepted else "NOT accepted"
        lines = [f"# {self.file}: {verdict}", "", self.reason, ""]
        if self.queued_for is not None:
            lines.append(f"- starts not before {self.queued_for}")
        if self.run_uri is not None:
            lines.append(f"- results: {self.run_uri}/completions/")
        if self.preflight is not None:
            # Indented: to a renderer it is code, whatever the prompt holds.
            text = "\n".join(preflight_lines(self.preflight))
            lines += ["", *(f"    {line}" for line in text.splitlines())]
        return "\n".join([*lines, ""]).encode("utf-8", "backslashreplace")


def letter_for(job: RunConfig, *, file: str, etag: str, work_dir: Path, now: datetime) -> Letter:
    """Check one file as `job` would use it.

    Args:
        job: With `input.uri` naming the file.
        file: Its name for the letter.
        etag: What it is at the moment.
        work_dir: Scratch.
        now: When the run could start at the earliest.

    Raises:
        StorageError, InferenceError: something else than the file and its settings is at fault, such
            as the model.
    """
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        try:
            found = preflight(
                job, work_dir=Path(folder), show_text=not job.output.private, now=lambda: now
            )
        except (BadInput, EngineConfigError) as error:
            return Letter(file=file, etag=etag, is_accepted=False, reason=str(error))
    num_good = found.num_rows - found.num_bad_rows
    reason = f"{num_good:,} of {found.num_rows:,} rows will be answered."
    if not found.num_rows:
        reason = "There are no rows in it."
    elif not num_good:
        reason = f"None of its {found.num_rows:,} rows can be used; see below why."
    return Letter(file=file, etag=etag, is_accepted=num_good > 0, reason=reason, preflight=found)
