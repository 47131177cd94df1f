"""Weights to this machine's fastest disk, and one paragraph on how that went."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from inference.config import Dtype
from storage.destinations import EngineMemory
from storage.errors import AccessDenied, NoSpace
from storage.model_cache import CacheEntry, Eviction
from storage.object_store import DEFAULT_STORAGE, StorageConfig
from storage.peek import Peeked, Spans, copy_config, peek_model
from storage.sizes import parse_bytes
from storage.stage_report import StageReport
from storage.staging import StagedModel, find_model, stage_model
from tasks.engine_memory import engine_memory
from tasks.job import RunConfig
from tasks.scratch import scratch_folder

NVME_DEMAND_GB_PER_S = 1.0
"""What staging must reach from and to NVMe; checked and said on every stage."""

_PHASE_WORDS = {
    "resolve": "opening the source",
    "list": "listing it",
    "describe": "asking for checksums",
    "wait": "waiting for another process",
    "resume": "checking what was there",
    "allocate": "reserving room",
    "transfer": "moving bytes",
    "convert": "converting GGUF",
    "publish": "publishing",
    "check": "checking in place",
}
_THREAD_WORDS = {"read": "waiting for the source", "checksum": "checksums", "write": "writing"}


def stage(
    source: str,
    *,
    storage: StorageConfig = DEFAULT_STORAGE,
    stage_to: str = "auto",
    dtype: Dtype = "auto",
    engine_memory: Callable[[int], EngineMemory] | None = None,
    budget_bytes: int | None = None,
    allowed_code: Iterable[str] = (),
    on_ready: Callable[[Path], None] | None = None,
    on_file: Callable[[Path], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> StagedModel:
    """Stage a model; like `storage.staging.stage_model`, and GGUF files are converted.

    Args:
        source: also `pkg:NAME`, the one .gguf file inside that installed package.
        dtype: of the weights that a GGUF file is unpacked to.

    Raises:
        StorageError: as `stage_model` does.
        ModelError: a GGUF file cannot be converted.
    """

    def convert(gguf: Path, folder: Path) -> Path:
        from inference.gguf import convert_gguf

        return convert_gguf(gguf, folder, dtype)

    return stage_model(
        _unpacked(source),
        config=storage,
        stage_to=stage_to,
        engine_memory=engine_memory,
        budget_bytes=budget_bytes,
        allowed_code=frozenset(allowed_code),
        convert_gguf=convert,
        gguf_dtype=dtype,
        on_ready=on_ready,
        on_file=on_file,
        on_progress=on_progress,
    )


def stage_for(
    job: RunConfig,
    *,
    on_ready: Callable[[Path], None] | None = None,
    on_file: Callable[[Path], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> StagedModel:
    """Stage the model of a job where the job says; raises as `stage` does."""
    return stage(
        job.model.source,
        storage=job.storage,
        stage_to=job.hardware.stage_to,
        dtype=job.model.dtype,
        engine_memory=partial(engine_memory, job),
        allowed_code=job.model.allowed_code,
        budget_bytes=parse_bytes(job.hardware.stage_budget, name="hardware.stage_budget"),
        on_ready=on_ready,
        on_file=on_file,
        on_progress=on_progress,
    )


def find_for(job: RunConfig) -> StagedModel | None:
    """The model of a job if no byte must be moved for it here; else None. Raises as `stage` does."""
    try:
        return find_model(
            _unpacked(job.model.source),
            config=job.storage,
            stage_to=job.hardware.stage_to,
            allowed_code=job.model.allowed_code,
            gguf_dtype=job.model.dtype,
        )
    except (AccessDenied, NoSpace):  # `stage_to` may be a folder that only replicas' machines have
        return None


def look_at(job: RunConfig, folder: Path, spans: Spans) -> Peeked | None:
    """Look at the model of a job; see `storage.peek.peek_model`."""
    return peek_model(
        _unpacked(job.model.source),
        folder,
        config=job.storage,
        spans=spans,
        allowed_code=job.model.allowed_code,
    )


@contextmanager
def config_of(source: str, *, storage: StorageConfig) -> Iterator[Path]:
    """Yield a folder with the model's config.json: its own, its staged copy, or one of that file alone.

    Raises:
        StorageError: it cannot be read, or is a GGUF file that is not staged.
        ModelError: `pkg:NAME` holds no GGUF file.
    """
    if Path(source).is_dir():
        yield Path(source)
        return
    unpacked = _unpacked(source)
    staged = find_model(unpacked, config=storage)
    if staged is not None:
        with staged:
            yield staged.path
        return
    with scratch_folder() as folder:
        copy_config(unpacked, folder, config=storage)
        yield folder


def _unpacked(source: str) -> str:
    """The file that `pkg:NAME` means; any other source as it is."""
    if not source.startswith("pkg:"):
        return source
    from inference.gguf import find_gguf

    return str(find_gguf(source))


def as_json(report: StageReport) -> dict[str, Any]:
    """The report for `--json`, with the judgement on its speed."""
    return {
        **asdict(report),
        "gb_per_s": round(report.gb_per_s, 3),
        "demand_gb_per_s": NVME_DEMAND_GB_PER_S,
        "meets_demand": meets_demand(report),
    }


def meets_demand(report: StageReport) -> bool | None:
    """Whether the transfer reached 1 GB/s; None when too little was moved to tell."""
    if report.bytes_moved < 100_000_000:
        return None
    return report.gb_per_s >= NVME_DEMAND_GB_PER_S


def describe(report: StageReport) -> str:
    """One paragraph: what was staged where and why, how fast, and where the time went."""
    head = (
        f"{report.source}: {report.num_files} files, {_gb(report.num_bytes)}, {report.outcome} at "
        f"{report.path} ({report.disk}) in {report.seconds:.2f} s: {report.reason}."
    )
    parts = [head, *_speed(report), _verification(report)]
    if report.evicted:
        parts.append(f"{len(report.evicted)} older models were evicted to make room.")
    if report.skipped:
        shown = ", ".join(report.skipped[:4]) + (", ..." if len(report.skipped) > 4 else "")
        parts.append(f"Not staged: {shown}.")
    return " ".join(parts)


def describe_cold_start(
    report: StageReport, *, before_s: float, ready_s: float, waited_s: float
) -> str:
    """Return one sentence on an engine that loaded while its model was staged.

    Args:
        report: of the staging.
        before_s: seconds of the staging before the engine began.
        ready_s: seconds from then until the engine was ready.
        waited_s: of these, waiting for files.
    """
    overlapped_s = max(0.0, report.seconds - before_s - waited_s)
    return (
        f"engine ready {ready_s:.1f} s after config and tokenizer were here, {waited_s:.1f} s of it waiting "
        f"for weights; of the {report.seconds:.1f} s that staging took, {overlapped_s:.1f} s passed while the "
        f"engine started and loaded"
    )


def describe_entries(entries: list[CacheEntry]) -> str:
    """A table of staged models for `nightjar stage --list`."""
    if not entries:
        return "no staged models on this machine"
    lines = []
    for entry in entries:
        flags = [
            word
            for word, is_set in (
                ("pinned", entry.is_pinned),
                ("in use", entry.is_in_use),
                ("partial", not entry.is_whole),
            )
            if is_set
        ]
        name = entry.source or "(not whole)"
        lines.append(
            f"{entry.content_id[:12]}  {_gb(entry.num_bytes):>9}  {name}  "
            f"{entry.path.parents[1]}  {', '.join(flags)}".rstrip()
        )
    return "\n".join(lines)


def describe_evictions(evictions: list[Eviction], *, dry_run: bool = False) -> str:
    """What `--evict` and `gc` did, or would do, a line each."""
    verb = "would be evicted, {} to be freed" if dry_run else "evicted, {} freed"
    lines = [
        f"{eviction.content_id}: kept, {eviction.kept_because}"
        if eviction.kept_because
        else f"{eviction.content_id}: {verb.format(_gb(eviction.freed_bytes))}"
        for eviction in evictions
    ]
    return "\n".join(lines) or "nothing to evict"


def _speed(report: StageReport) -> list[str]:
    if not report.bytes_moved:
        return []
    transfer_s = report.phases.get("transfer", 0.0)
    said = f"Moved {_gb(report.bytes_moved)} in {transfer_s:.2f} s = {report.gb_per_s:.2f} GB/s"
    shares = _share(report.gb_per_s, report.wire_gb_per_s, "the wire")
    shares += _share(report.gb_per_s, report.disk_write_gb_per_s, "what the disk can write")
    verdict = {
        True: f"the {NVME_DEMAND_GB_PER_S:.0f} GB/s that NVMe must give is met",
        False: f"below the {NVME_DEMAND_GB_PER_S:.0f} GB/s that NVMe must give",
        None: "too little to judge its speed by",
    }[meets_demand(report)]
    sentences = ["; ".join([said, *shares, verdict]) + "."]
    if report.bytes_resumed:
        sentences.append(f"{_gb(report.bytes_resumed)} were there from an earlier try.")
    if report.huge_bytes:
        sentences.append(f"{_gb(report.huge_bytes)} lie on huge pages.")
    if report.disk_read_gb_per_s is not None:
        sentences.append(f"The disk reads {report.disk_read_gb_per_s:.2f} GB/s.")
    return [*sentences, _where_time_went(report)]


def _share(gb_per_s: float, limit: float | None, name: str) -> list[str]:
    return [f"{gb_per_s / limit:.0%} of {name} ({limit:.2f} GB/s)"] if limit else []


def _where_time_went(report: StageReport) -> str:
    longest = sorted(report.phases.items(), key=lambda item: -item[1])[:3]
    phases = ", ".join(
        f"{_PHASE_WORDS.get(name, name)} {seconds:.2f} s" for name, seconds in longest if seconds
    )
    thread_s = sum(report.thread_s.values())
    if not thread_s:
        return f"Time: {phases}."
    threads = ", ".join(
        f"{seconds / thread_s:.0%} {_THREAD_WORDS[name]}"
        for name, seconds in report.thread_s.items()
    )
    cpu = report.cpu_s / (report.bytes_moved / 1e9)
    retries = f", {report.num_retries} ranges asked for again" if report.num_retries else ""
    return f"Time: {phases}; the threads spent {threads}; {cpu:.2f} CPU s/GB{retries}."


def _verification(report: StageReport) -> str:
    vouched = [f"{count} by {who}" for who, count in report.verified_by.items() if who]
    unvouched = report.verified_by.get("", 0)
    said = f"Verified: {', '.join(vouched)}" if vouched else "Verified: nothing"
    if unvouched:
        said += (
            f"; {unvouched} files have no recorded checksum, only their structure was checked: "
            "upload with a CRC64NVME checksum, or put SHA256SUMS beside them"
        )
    return said + "."


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
