"""Re-read everything a run stored and prove it: counts, row ids, digests, schemas.

Nothing is trusted that can be recomputed. Violations are listed, never repaired here.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage import keys, records
from storage.answers import answers_key, read_answers
from storage.commits import current_commits
from storage.errors import CorruptObject, NotFound
from storage.manifest import CommitRecord, PlanManifest, RunManifest, Shard, digest, file_digest
from storage.object_store import ObjectStore
from storage.reveal import read_manifest
from storage.shard_writer import read_part
from tasks.run_record import load_plan, load_shards


@dataclass(slots=True)
class Verification:
    """What was found. `violations` is empty when all that is stored is right."""

    num_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    num_parts: int = 0
    missing_shards: list[int] = field(default_factory=list)
    """Not committed, or committed a moment ago and not yet where readers look."""

    is_published: bool = False
    violations: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether the run is published and nothing is wrong."""
        return self.is_published and not self.violations and not self.missing_shards


def verify_run(store: ObjectStore, work_dir: Path) -> Verification:
    """Check a run folder against its plan. Reads every stored part once."""
    found = Verification()
    try:
        plan = load_plan(store)
        if plan is None:
            found.violations.append(
                f"{keys.PLAN}: missing; this is not a run folder, or not planned yet"
            )
            return found
        shards = load_shards(store, plan)
        plan_digest = digest(store.get(keys.PLAN))
        commits = current_commits(store, plan_digest)
        manifest = read_manifest(store)
    except CorruptObject as error:
        found.violations.append(str(error))
        return found
    found.is_published = manifest is not None
    found.missing_shards = [s.shard_id for s in shards if s.shard_id not in commits]
    _check_plan(plan, shards, found)
    schemas: dict[bytes, str] = {}
    for shard in shards:
        if shard.shard_id in commits:
            _check_part(store, work_dir, plan, shard, commits[shard.shard_id], found, schemas)
    _check_strangers(store, commits, found)
    if len(schemas) > 1:
        found.violations.append(f"parts differ in schema: {', '.join(schemas.values())}")
    if manifest is not None:
        _check_manifest(manifest, plan, commits, found)
    return found


def _check_plan(plan: PlanManifest, shards: list[Shard], found: Verification) -> None:
    expected = 0
    for shard in shards:
        if shard.row_start != expected:
            found.violations.append(
                f"plan: shard {shard.shard_id:05d} starts at row {shard.row_start}, expected {expected}"
            )
        expected = shard.row_end
    if expected != plan.num_rows or len(shards) != plan.num_shards:
        found.violations.append(
            f"plan: shards cover {expected} rows in {len(shards)} shards, "
            f"plan.json says {plan.num_rows} in {plan.num_shards}"
        )


def _check_part(
    store: ObjectStore,
    work_dir: Path,
    plan: PlanManifest,
    shard: Shard,
    record: CommitRecord,
    found: Verification,
    schemas: dict[bytes, str],
) -> None:
    key = keys.completions(shard.shard_id)
    path = work_dir / "verify.parquet"
    try:
        store.download(key, path)
        if file_digest(path) != record.part.sha256:
            found.violations.append(
                f"{key}: {path.stat().st_size} bytes that are not those of its commit "
                f"({record.part.size} bytes, attempt {record.attempt}); run again to restore it"
            )
            return
        counts = _count_rows(path, key, plan, shard, found, schemas)
    except NotFound:
        if not found.is_published:
            found.missing_shards.append(shard.shard_id)  # committed, and not yet revealed
            return
        found.violations.append(
            f"{key}: missing although its shard is committed; run again to restore it"
        )
        return
    except (CorruptObject, pa.ArrowException, OSError) as error:
        found.violations.append(f"{key}: unreadable: {error}")
        return
    finally:
        path.unlink(missing_ok=True)
    _check_answers(store, record, counts, found)
    found.num_parts += 1
    found.counts.update(counts)
    found.num_rows += sum(counts.values())
    if dict(counts) != {state: n for state, n in record.counts.items() if n}:
        found.violations.append(
            f"{key}: rows by state {dict(counts)}, its commit says {record.counts}"
        )
    if (record.row_start, record.row_end) != (shard.row_start, shard.row_end):
        found.violations.append(f"{key}: committed for other rows than planned")


def _check_answers(
    store: ObjectStore, record: CommitRecord, counts: Counter[str], found: Verification
) -> None:
    """Check what a later run would reuse by; that it is gone is no fault of this run's results."""
    sha256, key = record.receipt.get("answers"), answers_key(record)
    if not sha256:
        return
    try:
        column = read_answers(store.get(key), sha256=sha256, source=key)
    except NotFound:
        return
    except CorruptObject as error:
        found.violations.append(str(error))
        return
    if len(column) != sum(counts.values()) or len(column) - column.null_count != counts[records.OK]:
        found.violations.append(f"{key}: not the digests of its part's ok rows")


def _count_rows(
    path: Path,
    key: str,
    plan: PlanManifest,
    shard: Shard,
    found: Verification,
    schemas: dict[bytes, str],
) -> Counter[str]:
    """Check that every (row, sample) is there once and in order; count states."""
    counts: Counter[str] = Counter()
    position = 0
    schema = pq.read_schema(path).remove_metadata()
    schemas.setdefault(schema.serialize().to_pybytes(), key)
    # Every column is decoded, so a damaged page anywhere in the part is found.
    for batch in read_part(path):
        counts.update(batch.column("state").to_pylist())
        position = _check_order(batch, position, key, plan, shard, found)
    expected = shard.num_rows * plan.num_samples
    if position != expected:
        found.violations.append(f"{key}: {position} rows, planned {expected}")
    unknown = counts.keys() - set(records.STATES)
    if unknown:
        found.violations.append(f"{key}: unknown row states {sorted(unknown)}")
    return counts


def _check_order(
    batch: Any, position: int, key: str, plan: PlanManifest, shard: Shard, found: Verification
) -> int:
    rows = batch.column("row_index").to_pylist()
    samples = batch.column("sample_index").to_pylist()
    for row, sample in zip(rows, samples, strict=True):
        expected = divmod(position, plan.num_samples)
        if (row - shard.row_start, sample) != expected and len(found.violations) < 100:
            found.violations.append(
                f"{key}: position {position} holds row {row} sample {sample}, "
                f"planned row {expected[0] + shard.row_start} sample {expected[1]}"
            )
        position += 1
    return position


def _check_strangers(
    store: ObjectStore, commits: Mapping[int, CommitRecord], found: Verification
) -> None:
    allowed = {keys.completions(shard_id) for shard_id in commits}
    for info in store.list(keys.COMPLETIONS):
        if info.key not in allowed:
            found.violations.append(
                f"{info.key}: not of any committed shard; a reader would count it"
            )


def _check_manifest(
    manifest: RunManifest,
    plan: PlanManifest,
    commits: Mapping[int, CommitRecord],
    found: Verification,
) -> None:
    stated = {part["shard_id"]: part for part in manifest.parts}
    for shard_id, record in commits.items():
        part = stated.get(shard_id)
        if part is None or part["commit_digest"] != digest(record.to_json()):
            found.violations.append(
                f"manifest revision {manifest.revision}: shard {shard_id:05d} is not the committed one"
            )
    expected = plan.num_rows * plan.num_samples
    if manifest.num_rows != expected or sum(manifest.counts.values()) != expected:
        found.violations.append(
            f"manifest: {manifest.num_rows} rows, {sum(manifest.counts.values())} by state, planned {expected}"
        )
    if not found.violations and dict(found.counts) != manifest.counts:
        found.violations.append(
            f"manifest: rows by state {manifest.counts}, stored parts have {dict(found.counts)}"
        )
