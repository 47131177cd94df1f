"""The pre-flight letter: what a dropped file holds, and whether and when it will be worked on.

A whole plan is made in memory and thrown away; nothing is written but the letter, by the caller.
"""

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.errors import EngineConfigError, ModelError
from storage.errors import BadInput
from storage.manifest import to_json
from storage.memory_store import MemoryStore
from tasks.job import RunConfig
from tasks.progress import Progress
from tasks.run import Run, prepare
from tasks.sizing import choose

MAX_ROWS_COMPARED = 200_000
_PROMPT_CHARS = 4_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """What the sender of a file is told."""

    file: str
    etag: str
    is_accepted: bool
    reason: str
    """Why it is accepted or not, and what to change."""

    num_rows: int = 0
    num_prompt_tokens: int = 0
    num_shards: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)
    """By state, such as overlong or invalid_input."""

    bad_row_examples: list[dict[str, Any]] = field(default_factory=list)
    """The first of them: row_index, state, error."""

    num_repeated_prompts: int | None = None
    """Rows whose rendered prompt came before; None when no row can run."""

    first_prompt: str | None = None
    """As the model will see it."""

    expected: str | None = None
    """Hardware, time and cost, when they can be told."""

    warnings: Sequence[str] = ()
    queued_for: str | None = None
    """Not before this moment."""

    run_uri: str | None = None
    """Where the results will be."""

    def to_json(self) -> bytes:
        """Return the machine's copy."""
        return to_json({"format": 1, **dataclasses.asdict(self)})

    def to_markdown(self) -> bytes:
        """Return the reader's copy."""
        verdict = "accepted" if self.is_accepted else "NOT accepted"
        lines = [f"# {self.file}: {verdict}", "", self.reason, ""]
        if self.num_rows:
            lines += [f"- rows: {self.num_rows:,}, prompt tokens: {self.num_prompt_tokens:,}"]
        for state, count in self.bad_rows.items():
            lines.append(
                f"- {state}: {count:,} rows, which will have an error instead of an answer"
            )
        if self.num_repeated_prompts:
            lines.append(
                f"- {self.num_repeated_prompts:,} rows repeat the prompt of an earlier one"
            )
        lines += [f"- {warning}" for warning in self.warnings]
        if self.expected is not None:
            lines.append(f"- expected: {self.expected}")
        if self.queued_for is not None:
            lines.append(f"- starts not before {self.queued_for}")
        if self.run_uri is not None:
            lines.append(f"- results: {self.run_uri}/completions/")
        if self.bad_row_examples:
            lines += ["", "## Rows without an answer", "", "| row | state | why |", "|---|---|---|"]
            lines += [
                f"| {row['row_index']} | {row['state']} | {_cell(row['error'])} |"
                for row in self.bad_row_examples
            ]
        if self.first_prompt is not None:
            lines += ["", "## The first prompt, as the model sees it", ""]
            lines += [f"    {line}" for line in self.first_prompt.splitlines()]
        return "\n".join([*lines, ""]).encode("utf-8", "backslashreplace")


def letter_for(job: RunConfig, *, file: str, etag: str, work_dir: Path) -> Letter:
    """Check one file as `job` would use it.

    Args:
        job: With `input.uri` naming the file.
        file: Its name for the letter.
        etag: What it is at the moment.
        work_dir: Scratch.

    Raises:
        StorageError, InferenceError: something else than the file is at fault, such as the model.
    """
    in_memory = f"memory://preflight-{secrets.token_hex(8)}"
    trial = dataclasses.replace(
        job, output=dataclasses.replace(job.output, uri=in_memory), run_id="preflight"
    )
    try:
        run = prepare(trial, work_dir=work_dir, progress=Progress())
    except BadInput as error:
        return Letter(file=file, etag=etag, is_accepted=False, reason=str(error))
    try:
        return _letter(run, file, etag)
    finally:
        run.close()
        MemoryStore.forget(in_memory)


def _letter(run: Run, file: str, etag: str) -> Letter:
    plan = run.plan
    num_good = plan.num_rows - plan.num_bad_rows
    first_prompt, num_repeated = _look_at_prompts(run) if num_good else (None, None)
    reason = f"{num_good:,} of {plan.num_rows:,} rows will be answered."
    if not plan.num_rows:
        reason = "There are no rows in it."
    elif not num_good:
        reason = f"None of its {plan.num_rows:,} rows can be used; see below why."
    return Letter(
        file=file,
        etag=etag,
        is_accepted=num_good > 0,
        reason=reason,
        num_rows=plan.num_rows,
        num_prompt_tokens=plan.num_prompt_tokens,
        num_shards=plan.num_shards,
        bad_rows=plan.bad_rows_by_state,
        bad_row_examples=plan.bad_row_examples,
        num_repeated_prompts=num_repeated,
        first_prompt=first_prompt,
        expected=_expected(run) if num_good else None,
        warnings=tuple(plan.stats.get("warnings", ())),
    )


def _look_at_prompts(run: Run) -> tuple[str | None, int]:
    """Return the first prompt as text, and how many rows repeat an earlier one."""
    first: list[int] = []
    seen: set[int] = set()
    num_repeated = 0
    with run.open_feed() as feed:
        for batch in feed.read(run.plan, 0, min(run.plan.num_rows, MAX_ROWS_COMPARED)):
            for row in batch.rows:
                if row.state is not None:
                    continue
                first = first or list(row.token_ids)
                key = hash(tuple(row.token_ids))
                num_repeated += key in seen
                seen.add(key)
    from inference.chat_template import load_tokenizer  # transformers takes a while to import

    text: str = load_tokenizer(run.model.path).decode(first)
    return text[:_PROMPT_CHARS], num_repeated


def _expected(run: Run) -> str | None:
    if run.record.fingerprint_fields["engine.backend"] in ("dummy", "transformers"):
        return None  # sized for GPUs only
    try:
        tier, _ = choose(run)
    except (EngineConfigError, ModelError) as error:
        return f"not known: {error}"
    cost = "" if tier.usd is None else f", about ${tier.usd:,.2f}"
    return f"{tier.label}: about {tier.seconds / 3600:.1f} hours{cost}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
