"""The second half of planning: count every row's tokens and cut the shards."""

import dataclasses
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from storage.errors import BadInput
from storage.manifest import InputFile, Shard
from tasks.content import NOT_RUN
from tasks.duplicate_ids import check_ids, num_repeated
from tasks.feed_batches import from_counts
from tasks.feed_process import FeedProcess
from tasks.feed_spec import STATE_CODES
from tasks.job import RunConfig, ShardConfig
from tasks.plan_inputs import LocalInput, PlannedInput
from tasks.reuse import ReuseIndex

NUM_EXAMPLES = 20
_ERROR_CODE = STATE_CODES.index("invalid_input")


@dataclass(slots=True)
class Count:
    """What the pass over all rows found."""

    shards: list[Shard]
    inputs: list[InputFile]
    num_rows: int
    num_prompt_tokens: int
    bad_rows: dict[str, int]
    examples: list[dict[str, Any]]
    stats: dict[str, Any]


def count_rows(
    job: RunConfig,
    planned: PlannedInput,
    output_schema: str,
    process: FeedProcess,
    on_progress: Callable[[int, int], None] | None,
    reuse: ReuseIndex | None = None,
) -> Count:
    """Prepare every row once, without keeping it; count those whose answers `reuse` has.

    Raises:
        BadInput: a file is damaged (unless error rows are asked for), or ids repeat.
    """
    total = sum(local.file.num_rows for local in planned.files)
    cutter = ShardCutter(job.shards, reuse=reuse, num_samples=job.sampling.n)
    inputs = []
    for local in planned.files:
        inputs.append(_count_file(job, local, output_schema, process, cutter, on_progress, total))
    if planned.columns.id is not None and job.input.on_duplicate_id == "fail":
        check_ids(planned, planned.columns.id, cutter.digests, process)
    count = cutter.finish(inputs)
    if planned.columns.id is not None:
        count.stats["num_repeated_ids"] = num_repeated(cutter.digests["digest"])
    return count


def _count_file(
    job: RunConfig,
    local: LocalInput,
    output_schema: str,
    process: FeedProcess,
    cutter: "ShardCutter",
    on_progress: Callable[[int, int], None] | None,
    total: int,
) -> InputFile:
    file = local.file
    if file.error is not None:
        cutter.add_errors(file.num_rows, file.error)
        return file
    request = {
        "op": "prepare",
        "path": str(local.path),
        "name": file.uri,
        "first": file.row_start,
        "row_start": file.row_start,
        "row_end": file.row_start + file.num_rows,
        "schema": output_schema,
        "mode": "count",
    }
    mark = cutter.mark()
    try:
        for frame in process.prepare(request):
            cutter.add(from_counts(frame.payload), frame.header["num_replaced"])
            if on_progress is not None:
                on_progress(cutter.num_rows, total)
    except BadInput as error:
        if job.input.on_bad_file == "fail":
            raise
        # The whole file becomes error rows: replicas then need not find the same fault again.
        cutter.reset(mark)
        cutter.add_errors(file.num_rows, str(error))
        return dataclasses.replace(file, error=str(error))
    return file


@dataclass(slots=True)
class _Totals:
    """Everything a damaged file's rows must be taken out of again; small, so it is simply copied."""

    num_rows: int = 0
    row_start: int = 0  # of the shard being filled
    tokens: int = 0
    bad: int = 0
    num_prompt_tokens: int = 0
    num_shared: int = 0
    num_truncated: int = 0
    num_replaced: int = 0
    num_shards: int = 0
    num_digests: int = 0
    num_prompts: int = 0
    num_reused: int = 0  # sequences
    num_reused_tokens: int = 0  # of their prompts
    bad_rows: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    histogram: list[int] = field(default_factory=lambda: [0] * 32)


class ShardCutter:
    """Cuts contiguous shards of about `target_tokens`, never above `max_rows`, and adds up."""

    def __init__(
        self, config: ShardConfig, *, reuse: ReuseIndex | None = None, num_samples: int = 1
    ) -> None:
        self._config = config
        self._reuse = reuse
        self._num_samples = num_samples
        self._totals = _Totals()
        self._shards: list[Shard] = []
        self.digests: dict[str, Any] = {"digest": array("Q"), "row": array("q")}
        self._prompts = array("Q")  # a digest of every prompt that can run

    @property
    def num_rows(self) -> int:
        return self._totals.num_rows

    def add(self, counts: Any, num_replaced: int) -> None:
        """Take a batch of counts, in order."""
        totals = self._totals
        tokens = counts.column("num_tokens").fill_null(0).to_numpy(zero_copy_only=False)
        states = counts.column("state").to_numpy()
        self._note_ids(counts.column("digest"))
        prompts = counts.column("prompt").drop_null().to_numpy()
        self._prompts.frombytes(prompts.astype("<u8").tobytes())
        bad = np.flatnonzero(states)
        for index in bad[: max(0, NUM_EXAMPLES - len(totals.examples))].tolist():
            error = counts.column("error")[index].as_py()
            self._example(totals.num_rows + index, int(states[index]), error)
        for code, number in zip(*np.unique(states[bad], return_counts=True), strict=True):
            state = str(STATE_CODES[code])
            totals.bad_rows[state] = totals.bad_rows.get(state, 0) + int(number)
        runnable = np.where(states == 0, tokens, 0)
        buckets = np.bincount(np.ceil(np.log2(np.maximum(runnable[states == 0], 1))).astype(int))
        for bucket, number in enumerate(buckets.tolist()):
            totals.histogram[bucket] += number
        totals.num_prompt_tokens += int(runnable.sum())
        totals.num_shared += int(counts.column("num_shared").to_numpy().sum())
        totals.num_truncated += counts.column("is_truncated").true_count
        totals.num_replaced += num_replaced
        self._note_known(counts.column("content").to_pylist(), runnable)
        self._cut(runnable.tolist(), states.tolist())

    def add_errors(self, num_rows: int, error: str) -> None:
        """Take the rows of an unreadable file."""
        for index in range(min(num_rows, NUM_EXAMPLES - len(self._totals.examples))):
            self._example(self._totals.num_rows + index, _ERROR_CODE, error)
        bad_rows = self._totals.bad_rows
        bad_rows["invalid_input"] = bad_rows.get("invalid_input", 0) + num_rows
        for first in range(0, num_rows, 4096):
            count = min(4096, num_rows - first)
            self._cut([0] * count, [_ERROR_CODE] * count)

    def mark(self) -> _Totals:
        """Return a point to `reset` to."""
        totals = self._totals
        return dataclasses.replace(
            totals,
            num_shards=len(self._shards),
            num_digests=len(self.digests["row"]),
            num_prompts=len(self._prompts),
            bad_rows=dict(totals.bad_rows),
            examples=list(totals.examples),
            histogram=list(totals.histogram),
        )

    def reset(self, mark: _Totals) -> None:
        """Forget everything added since `mark`."""
        self._totals = mark
        del self._shards[mark.num_shards :]
        for kept in self.digests.values():
            del kept[mark.num_digests :]
        del self._prompts[mark.num_prompts :]

    def finish(self, inputs: list[InputFile]) -> Count:
        """Close the last shard and return the sums."""
        totals = self._totals
        self._close()
        shared = totals.num_shared / totals.num_prompt_tokens if totals.num_prompt_tokens else 0.0
        upper = [2**power for power in range(32)]
        histogram = {
            str(limit): number
            for limit, number in zip(upper, totals.histogram, strict=True)
            if number
        }
        stats = {
            "prompt_tokens_histogram": histogram,
            "shared_prefix_share": round(shared, 4),
            "num_truncated_prompts": totals.num_truncated,
            "num_replaced_values": totals.num_replaced,
            "num_repeated_prompts": num_repeated(self._prompts),
            "num_reused_sequences": totals.num_reused,
            "num_reused_prompt_tokens": totals.num_reused_tokens,
        }
        return Count(
            self._shards,
            inputs,
            totals.num_rows,
            totals.num_prompt_tokens,
            dict(sorted(totals.bad_rows.items())),
            totals.examples,
            stats,
        )

    def _cut(self, tokens: list[int], states: list[int]) -> None:
        totals, config = self._totals, self._config
        for num_tokens, state in zip(tokens, states, strict=True):
            rows = totals.num_rows - totals.row_start
            if rows and (
                rows >= config.max_rows or totals.tokens + num_tokens > config.target_tokens
            ):
                self._close()
            totals.num_rows += 1
            totals.tokens += num_tokens
            totals.bad += state != 0

    def _close(self) -> None:
        totals = self._totals
        if totals.num_rows == totals.row_start:
            return
        self._shards.append(
            Shard(
                shard_id=len(self._shards),
                row_start=totals.row_start,
                row_end=totals.num_rows,
                num_prompt_tokens=totals.tokens,
                num_bad_rows=totals.bad,
            )
        )
        totals.row_start, totals.tokens, totals.bad = totals.num_rows, 0, 0

    def _example(self, row_index: int, code: int, error: str) -> None:
        example = {"row_index": row_index, "state": STATE_CODES[code], "error": error}
        self._totals.examples.append(example)

    def _note_known(self, contents: list[bytes | None], tokens: Any) -> None:
        if self._reuse is None:
            return
        known = self._reuse.num_known([c or NOT_RUN for c in contents], self._num_samples)
        self._totals.num_reused += sum(known)
        self._totals.num_reused_tokens += int(np.dot(known, tokens))

    def _note_ids(self, column: Any) -> None:
        valid = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        if len(valid):
            found = column.fill_null(0).to_numpy()[valid]
            self.digests["digest"].frombytes(found.astype("<u8").tobytes())
            self.digests["row"].frombytes((valid + self._totals.num_rows).astype("<i8").tobytes())
