"""The answers of one shard by digest: which an earlier run has, and what a later one will find."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from storage.answers import NUM_BYTES, WrittenAnswers, write_answers
from tasks.content import NOT_RUN, answer_digest, prompt_digest, row_digest
from tasks.feed_batches import PreparedRow
from tasks.results import SampleResult
from tasks.reuse import ReuseIndex


@dataclass(slots=True, kw_only=True)
class ShardAnswers:
    """Rows are added in order; `NUM_BYTES` are kept of each of their samples."""

    engine: bytes
    """See `tasks.content.engine_digest`."""

    num_samples: int = 1
    index: ReuseIndex | None = None
    reused: Counter[str] = field(default_factory=Counter)
    """See `tasks.receipt.ShardFacts`."""

    _digests: bytearray = field(default_factory=bytearray)

    def add(self, row: PreparedRow) -> None:
        """Take the next row."""
        if row.state is not None:
            self._digests += NOT_RUN * self.num_samples
            return
        prompt = prompt_digest(row.token_ids, is_thinking=row.is_thinking)
        content = row_digest(prompt, row.sampling, row.row_key)
        for sample_index in range(self.num_samples):
            self._digests += answer_digest(self.engine, content, sample_index)

    def fetch(self, wanted: Iterable[int]) -> Iterator[tuple[int, SampleResult]]:
        """Yield the answers that an earlier run has to these output rows of the shard, in any order.

        `row_index` is theirs in that run. Raises StorageError when it cannot be reached.
        """
        if self.index is None:
            return
        rows = list(wanted)
        at: defaultdict[int, list[int]] = defaultdict(list)
        for row, place in zip(rows, self.index.locate([self._of(r) for r in rows]), strict=True):
            if place >= 0:
                at[place].append(row)
        for place, result in self.index.fetch(list(at)):
            for row in at[place]:
                self._count(result)
                yield row, result

    def write(self, path: Path, is_ok: Sequence[bool]) -> WrittenAnswers:
        """Write what a later run can find; `is_ok` is of every output row of the part."""
        return write_answers(path, bytes(self._digests), is_ok)

    def _of(self, row: int) -> bytes:
        return bytes(self._digests[row * NUM_BYTES : (row + 1) * NUM_BYTES])

    def _count(self, result: SampleResult) -> None:
        count = result.num_completion_tokens
        self.reused["rows"] += 1
        self.reused["completion"] += count
        self.reused["context"] += count * (result.num_prompt_tokens or 0) + count * (count - 1) // 2
