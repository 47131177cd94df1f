"""Canary: a stratified sample of rows runs on one engine before anything else is started.

Its rates are held against the job's thresholds and the last good run of the same template and model, so
that a wrong template ends the night in minutes, with the evidence. Its answers are kept: shards that
hold its rows take them over (`_canary.parquet`), and a second look needs no engine.
"""

import io
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from inference.backends.base import Backend
from inference.errors import EngineConfigError
from inference.sampling import draw_seed
from inference.sequence import Completion
from inference.sequence import Sequence as EngineSequence
from storage import keys, records
from storage.errors import NotFound
from storage.manifest import PlanManifest, to_json
from storage.object_store import ObjectStore
from tasks.feed import PreparedRow, PromptFeed
from tasks.history import PastRun
from tasks.job_machine import CanaryConfig
from tasks.repetition import is_repetitive
from tasks.results import ResultColumns, RowOutcome, SampleResult, sample_result, stored_sample
from tasks.unforeseen import engine_faults

Kept = Mapping[tuple[int, int], SampleResult]
"""Answers by row and sample."""

_PREFIX_TOKENS = 32
_NUM_WINDOWS = 16
_WINDOW_ROWS = 64
_MIN_RUN = 10  # a run must be this many times its canary to be worth one
_WORSE_BY = 0.25  # rates may exceed the last good run's by so much


class CanaryFailed(EngineConfigError):
    """The sample went wrong; nothing else was started. The message has the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryResult:
    """What the sample showed. Rates are shares of its sequences."""

    num_rows: int
    num_sequences: int
    num_completion_tokens: int
    error_rate: float
    truncated_rate: float
    repetitive_rate: float
    completion_tokens_per_s: float
    seconds: float
    row_indices: list[int]
    device: str = ""
    """It ran on; throughput is compared on the same one only."""

    @property
    def mean_tokens(self) -> float:
        """Completion tokens of a sequence."""
        return self.num_completion_tokens / self.num_sequences if self.num_sequences else 0.0


def wants_canary(config: CanaryConfig, plan: PlanManifest) -> bool:
    """Whether the run is large enough, beside its canary, to be worth one."""
    runnable = plan.num_rows - plan.num_bad_rows
    fresh = runnable - plan.stats.get("num_reused_sequences", 0) / plan.num_samples
    return config.rows > 0 and fresh >= _MIN_RUN * config.rows


def read_canary(store: ObjectStore) -> CanaryResult | None:
    """Return what an earlier start of this run measured."""
    try:
        return CanaryResult(**json.loads(store.get(keys.CANARY)))
    except NotFound:
        return None


def run_canary(
    store: ObjectStore,
    plan: PlanManifest,
    feed: PromptFeed,
    backend: Backend,
    *,
    num_rows: int,
    columns: ResultColumns,
    is_known: Callable[[PreparedRow], bool] = lambda row: False,
) -> CanaryResult:
    """Run the sample and keep its answers; rows that an earlier run answered are not in it.

    Raises:
        EngineFault: the engine broke.
        InferenceError: it cannot be used at all.
        StorageError: rows cannot be read, or answers not be kept.
    """
    rows = choose_rows([r for r in _candidates(plan, feed) if not is_known(r)], num_rows)
    started = time.monotonic()
    samples, num_repetitive = _generate(rows, backend, plan.num_samples)
    seconds = time.monotonic() - started
    states = Counter(sample.state for sample in samples)
    count = max(1, len(samples))
    tokens = sum(sample.num_completion_tokens for sample in samples)
    result = CanaryResult(
        num_rows=len(rows),
        num_sequences=len(samples),
        num_completion_tokens=tokens,
        error_rate=round(states[records.ENGINE_ERROR] / count, 4),
        truncated_rate=round(states[records.TRUNCATED] / count, 4),
        repetitive_rate=round(num_repetitive / count, 4),
        completion_tokens_per_s=round(tokens / seconds, 2) if seconds > 0 else 0.0,
        seconds=round(seconds, 3),
        row_indices=[row.row_index for row in rows],
        device=backend.info.device,
    )
    _keep(store, samples, columns)
    store.put(keys.CANARY, to_json(asdict(result)))
    return result


def choose_rows(candidates: Sequence[PreparedRow], num_rows: int) -> list[PreparedRow]:
    """Choose rows over all prefix groups, and over the lengths within each; the same ones every time."""
    groups: dict[bytes, list[PreparedRow]] = defaultdict(list)
    for row in candidates:
        groups[bytes(memoryview(_prefix(row)).cast("B"))].append(row)
    ordered = sorted(groups.values(), key=lambda rows: (-len(rows), rows[0].row_index))
    for rows in ordered:
        rows.sort(key=lambda row: (len(row.token_ids), row.row_index))
    chosen: list[PreparedRow] = []
    for rows, share in zip(
        ordered, _shares([len(rows) for rows in ordered], num_rows), strict=True
    ):
        # Evenly spaced over the sorted lengths, shortest and longest included.
        last = max(1, share - 1)
        places = {round(i * (len(rows) - 1) / last) for i in range(share)}
        chosen += [rows[place] for place in sorted(places)]
    return sorted(chosen, key=lambda row: row.row_index)


def verdict(result: CanaryResult, config: CanaryConfig, last: PastRun | None) -> str | None:
    """Return what is wrong with the sample; None if nothing is."""
    faults = []
    past = _past_rates(last)
    for name, limit in (
        ("error_rate", config.max_error_rate),
        ("truncated_rate", config.max_truncated_rate),
        ("repetitive_rate", config.max_repetitive_rate),
    ):
        value = getattr(result, name)
        if limit is not None and value > limit:
            faults.append(f"{name} is {value:.2f}, canary.max_{name} is {limit:.2f}")
        elif name in past and value > past[name] + _WORSE_BY:
            faults.append(f"{name} is {value:.2f}, the last good run had {past[name]:.2f}")
    if last is not None and config.max_length_factor is not None and last.mean_completion_tokens:
        factor = result.mean_tokens / last.mean_completion_tokens
        if not 1 / config.max_length_factor <= factor <= config.max_length_factor:
            faults.append(
                f"completions have {result.mean_tokens:.0f} tokens on average, the last good run "
                f"had {last.mean_completion_tokens:.0f}"
            )
    before, rate = last_canary_rate(result, last), result.completion_tokens_per_s
    if before is not None and config.max_slowdown and rate * config.max_slowdown < before:
        faults.append(f"{rate:.1f} tokens/s, the canary of the last good run made {before:.1f}")
    return "; ".join(faults) or None


def last_canary_rate(result: CanaryResult, last: PastRun | None) -> float | None:
    """Return the tokens per second of the last good run's canary, if it ran on such a device."""
    if last is None or last.device != result.device:
        return None
    return last.canary_tokens_per_s


def refuse_bad_canary(
    store: ObjectStore, result: CanaryResult, config: CanaryConfig, last: PastRun | None
) -> None:
    """Stop the run on a bad sample.

    Raises:
        CanaryFailed: names each rate with its limit, and where the answers are.
    """
    fault = verdict(result, config, last)
    if fault is not None:
        raise CanaryFailed(
            f"canary of {result.num_rows} rows: {fault}; look at {store.uri}/{keys.CANARY_PART}, then "
            "mend the prompt, or raise the limit, or go on with --set canary.rows=0"
        )


def kept_answers(store: ObjectStore) -> Kept:
    """Return the canary's answers for the shards that hold its rows; failed rows are not among them."""
    try:
        data = store.get(keys.CANARY_PART)
    except NotFound:
        return {}
    found = {}
    for row in pq.read_table(io.BytesIO(data)).to_pylist():
        if row["state"] in records.ANSWERED:
            found[row["row_index"], row["sample_index"]] = stored_sample(row)
    return found


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """Divide `total` over groups: one each, largest first, the rest in proportion to their sizes."""
    total = min(total, sum(sizes))
    shares = [1 if index < total else 0 for index in range(len(sizes))]
    left = total - sum(shares)
    rooms = [size - share for size, share in zip(sizes, shares, strict=True)]
    for index, room in enumerate(rooms):
        more = min(room, round(left * room / max(1, sum(rooms[index:]))))
        shares[index] += more
        left -= more
    return shares


def _candidates(plan: PlanManifest, feed: PromptFeed) -> list[PreparedRow]:
    """Rows of windows spread evenly over the input; reading it all would be a second plan."""
    found: list[PreparedRow] = []
    step = max(_WINDOW_ROWS, plan.num_rows // _NUM_WINDOWS)
    for start in range(0, plan.num_rows, step):
        end = min(plan.num_rows, start + _WINDOW_ROWS)
        for batch in feed.read(plan, start, end):
            found += [row for row in batch.rows if row.state is None]
    return found


def _generate(
    rows: Sequence[PreparedRow], backend: Backend, num_samples: int
) -> tuple[list[SampleResult], int]:
    owners = [(row, sample) for row in rows for sample in range(num_samples)]
    done: dict[int, Completion] = {}
    with engine_faults():
        backend.submit(
            EngineSequence(
                seq_id=index,
                prompt_token_ids=row.token_ids,
                sampling=row.sampling,
                draw_seed=draw_seed(row.sampling.seed, row.row_key, sample),
            )
            for index, (row, sample) in enumerate(owners)
        )
        while backend.num_unfinished:
            for completion in backend.step():
                done[completion.seq_id] = completion
    samples = []
    for index, (row, sample) in enumerate(owners):
        outcome = RowOutcome(
            row.row_index, row.num_prompt_tokens, row.is_thinking, row.state, row.error
        )
        samples.append(sample_result(outcome, sample, done[index]))
    return samples, sum(is_repetitive(completion.token_ids) for completion in done.values())


def _keep(store: ObjectStore, samples: Sequence[SampleResult], columns: ResultColumns) -> None:
    schema = pa.schema(columns.fields)
    batch = pa.RecordBatch.from_arrays(columns.arrays(samples, 0), schema=schema)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_batches([batch]), sink, compression="zstd")
    store.put(keys.CANARY_PART, sink.getvalue())


def _prefix(row: PreparedRow) -> Any:
    return row.token_ids[:_PREFIX_TOKENS]


def _past_rates(last: PastRun | None) -> dict[str, float]:
    if last is None:
        return {}
    count = max(1, last.num_rows)
    states: Iterable[tuple[str, str]] = (
        ("error_rate", records.ENGINE_ERROR),
        ("truncated_rate", records.TRUNCATED),
    )
    rates = {name: last.rows_by_state.get(state, 0) / count for name, state in states}
    return rates | {"repetitive_rate": last.num_repetitive / count}
