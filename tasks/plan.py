"""make_plan: one streaming pass over the input that checks every row and cuts the shards.

Shards are contiguous and about equal in prompt tokens. The plan is written once, by create-only puts
(plan.parquet, then plan.json); whoever comes second adopts what is stored.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa

from inference.errors import EngineConfigError
from storage import keys, records
from storage.errors import AlreadyExists, BadInput, CorruptObject, FingerprintMismatch
from storage.failpoints import failpoint
from storage.input_schema import encode_schema
from storage.inputs import InputFiles
from storage.manifest import PlanManifest, RunRecord, digest
from storage.object_store import ObjectStore
from tasks.feed_process import FeedProcess
from tasks.feed_spec import FeedLimits
from tasks.job import RunConfig
from tasks.plan_count import Count, count_rows
from tasks.plan_inputs import PlannedInput, plan_inputs
from tasks.plan_table import shards_from_bytes, shards_to_bytes
from tasks.reuse import ReuseIndex, named_runs, open_reuse
from tasks.run_record import load_plan

Progress = Callable[[int, int], None]
"""Called with rows done and rows in total."""


def make_plan(
    *,
    job: RunConfig,
    record: RunRecord,
    store: ObjectStore,
    model_dir: Path,
    work_dir: Path,
    max_model_len: int,
    on_progress: Progress | None = None,
    limits: FeedLimits | None = None,
    files: InputFiles | None = None,
    process: FeedProcess | None = None,
) -> PlanManifest:
    """Plan the run, or return the plan that is stored already. `store` is the run folder.

    A `process` that is handed in stays open, for the feed to go on with.

    Raises:
        BadInput: the input or the job's use of it is wrong; names file, place and remedy.
        InputChanged: a file changed while it was planned.
        ModelError, EngineConfigError: tokenizer, chat template or sampling cannot work.
        FingerprintMismatch: the stored plan is of other settings.
    """
    stored = load_plan(store)
    if stored is not None:
        return _adopted(stored, record, store)
    _check_job(job)
    work_dir.mkdir(parents=True, exist_ok=True)
    files = files or InputFiles(work_dir, job.storage)
    own = FeedProcess.of(job, model_dir=model_dir, max_model_len=max_model_len, limits=limits)
    with own if process is None else nullcontext(process) as process:
        planned = plan_inputs(job, files, process, store, work_dir)
        output = _output_schema(job, planned.schema)
        process.load(planned.columns)
        with _reuse(job, record, store, work_dir) as reuse:
            count = count_rows(
                job, planned, encode_schema(output), process, on_progress, reuse=reuse
            )
        warnings = [*planned.warnings, *process.warnings, *(reuse.notes if reuse else ())]
        if reuse is not None:
            count.stats["reuse_from"] = reuse.uris
    table = _create(store, keys.PLAN_TABLE, shards_to_bytes(count.shards))
    failpoint("after_plan_table")
    plan = _manifest(job, record, planned, output, count, table, warnings)
    data = _create(store, keys.PLAN, plan.to_json())
    failpoint("after_plan")
    return PlanManifest.from_json(data, source=f"{store.uri}/{keys.PLAN}")


@contextmanager
def _reuse(
    job: RunConfig, record: RunRecord, store: ObjectStore, work_dir: Path
) -> Iterator[ReuseIndex | None]:
    uris = named_runs(job)
    if not uris:
        yield None
        return
    index = open_reuse(
        uris,
        record.fingerprint_fields,
        storage=job.storage,
        folder=work_dir / "reuse",
        own_uri=store.uri,
    )
    try:
        yield index
    finally:
        index.close()


def _adopted(plan: PlanManifest, record: RunRecord, store: ObjectStore) -> PlanManifest:
    if plan.fingerprint != record.fingerprint:
        raise FingerprintMismatch(
            f"{store.uri}: its plan has fingerprint {plan.fingerprint}, this job "
            f"{record.fingerprint}; use another output.uri or run_id"
        )
    return plan


def _check_job(job: RunConfig) -> None:
    try:
        job.sampling.params()
    except ValueError as error:
        raise EngineConfigError(f"sampling: {error}") from None
    if job.shards.target_tokens < 1 or job.shards.max_rows < 1:
        raise BadInput("shards.target_tokens and shards.max_rows must be at least 1")


def _output_schema(job: RunConfig, schema: pa.Schema) -> pa.Schema:
    """Return the copied-through columns under their final names.

    Raises:
        BadInput: a column to copy or rename does not exist, or a name is taken.
    """
    asked = [] if job.output.columns == "all" else list(job.output.columns)
    for option, given in (("columns", asked), ("rename", list(job.output.rename))):
        unknown = [name for name in given if name not in schema.names]
        if unknown and len(schema):
            have = ", ".join(schema.names)
            raise BadInput(f"output.{option}: no column {unknown[0]!r}; there are: {have}")
    sources = [n for n in schema.names if job.output.columns == "all" or n in asked]
    final = [job.output.rename.get(name, name) for name in sources]
    taken = {field.name for field in records.result_fields(token_ids=True, logprobs=True)}
    for name, source in zip(final, sources, strict=True):
        if name in taken:
            raise BadInput(
                f"input column {source!r} would be {name!r} in the output, which is a result "
                f"column; set output.rename to {{{source}: input_{source}}}, or leave it out of "
                "output.columns"
            )
        if final.count(name) > 1:
            raise BadInput(f"output.rename makes two columns {name!r}; choose another name")
    fields = [schema.field(name) for name in sources]
    return pa.schema([field.with_name(name) for field, name in zip(fields, final, strict=True)])


def _create(store: ObjectStore, key: str, data: bytes) -> bytes:
    """Create the object, or return the bytes of whoever was first."""
    try:
        store.put_if_absent(key, data)
    except AlreadyExists:
        return store.get(key)
    return data


def _manifest(
    job: RunConfig,
    record: RunRecord,
    planned: PlannedInput,
    output: pa.Schema,
    count: Count,
    table: bytes,
    warnings: list[str],
) -> PlanManifest:
    shards = shards_from_bytes(table, source=keys.PLAN_TABLE)
    if [shard.row_end for shard in shards][-1:] != [count.num_rows][: len(shards)]:
        raise CorruptObject(
            f"{keys.PLAN_TABLE}: a plan of another input is stored; delete it, or use another run_id"
        )
    stats: dict[str, Any] = {**count.stats, "warnings": warnings}
    return PlanManifest(
        run_id=record.run_id,
        fingerprint=record.fingerprint,
        table_digest=digest(table),
        num_shards=len(shards),
        num_rows=count.num_rows,
        num_samples=job.sampling.n,
        num_prompt_tokens=count.num_prompt_tokens,
        num_bad_rows=sum(count.bad_rows.values()),
        bad_rows_by_state=count.bad_rows,
        bad_row_examples=count.examples,
        input_schema=encode_schema(output),
        inputs=count.inputs,
        prompt_columns=planned.columns.to_json(),
        stats=stats,
    )
