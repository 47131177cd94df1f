"""Commands about a model on machines: bring it here, say where it fits, measure it."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows import console
from flows.cli import EXIT_OK, EXIT_REFUSED
from flows.config import JobError, load_job
from flows.night_commands import print_document, storage_of
from flows.signals import signals
from inference.backends.base import BackendInfo
from inference.hardware import GpuType
from inference.workload import Workload
from storage.object_store import StorageConfig
from tasks.bench import MixResult
from tasks.job import RunConfig, job_of
from tasks.progress import Progress
from tasks.scratch import scratch_folder

_JOB_SUFFIXES = (".yaml", ".yml", ".json")
_ENGINE_FIELDS = (
    "backend",
    "device",
    "dtype",
    "num_ranks",
    "load_s",
    "compile_wait_s",
    "warmup_s",
    "memory",
)


def stage(args: argparse.Namespace) -> int:
    """Stage, list, pin or evict models on this machine."""
    from storage import model_caches
    from storage.sizes import parse_bytes
    from tasks.stage import as_json, describe, describe_entries, describe_evictions
    from tasks.stage import stage as stage_model

    roots = model_caches.roots_of(args.to)
    if args.list:
        entries = model_caches.list_staged(roots)
        document = {"models": [_plain(entry._asdict()) for entry in entries]}
        print_document(args, document, describe_entries(entries))
        return EXIT_OK
    if args.model is None:
        raise JobError("stage: name a model, or give --list")
    if args.evict:
        evictions = model_caches.evict(args.model, roots=roots)
        document = {"evicted": [eviction._asdict() for eviction in evictions]}
        print_document(args, document, describe_evictions(evictions))
        return EXIT_OK if all(not e.kept_because for e in evictions) else EXIT_REFUSED
    if args.unpin:
        model_caches.pin(args.model, pinned=False, roots=roots)
        print_document(args, {"unpinned": args.model}, f"{args.model}: may be evicted again")
        return EXIT_OK
    budget_bytes = parse_bytes(args.budget, name="--budget")
    with stage_model(
        args.model,
        storage=storage_of(args),
        stage_to=args.to,
        budget_bytes=budget_bytes,
        allowed_code=args.allowed_code,
    ) as staged:
        text, is_in_cache = describe(staged.report), staged.lock is not None
        if args.pin and is_in_cache:
            model_caches.pin(staged.content_id, roots=[staged.path.resolve().parents[1]])
        elif args.pin:
            text += " Nothing to pin: it lies in no cache, so nothing evicts it."
        document = _plain(as_json(staged.report)) | {"is_pinned": args.pin and is_in_cache}
        print_document(args, document, text)
    return EXIT_OK


def tiers(args: argparse.Namespace) -> int:
    """Size a model from its config alone, on every GPU type known."""
    from inference.tiers import DEFAULT_WORKLOAD, tiers_table
    from tasks.sizing import size
    from tasks.stage import config_of

    job, workload = (None, DEFAULT_WORKLOAD) if args.job is None else _asked(args)
    storage = storage_of(args)
    if job is not None and storage == StorageConfig():
        storage = job.storage
    with config_of(args.model, storage=storage) as folder:
        sizing = size(folder, workload, _hardware(args, job))
    rows = tiers_table(sizing, detail="all" if args.all else "smallest")
    if args.json:
        print(json.dumps(rows))
    else:
        console.print_tiers(rows)
    return EXIT_OK if sizing.best is not None else EXIT_REFUSED


def _hardware(args: argparse.Namespace, job: RunConfig | None) -> list[GpuType]:
    """The GPU types to size for: of `--hardware`, else the job's at its prices, else those that come along."""
    from tasks.choose_tier import priced_hardware
    from tasks.hardware import load_hardware, read_hardware

    if job is None:
        return load_hardware(args.hardware)
    if args.hardware is not None:
        gpus = read_hardware(args.hardware)
        job = replace(job, hardware=replace(job.hardware, gpus=gpus))
    return priced_hardware(job)


def _asked(args: argparse.Namespace) -> tuple[RunConfig, Workload]:
    """The job or planned run of `--for`, and what it asks of an engine; nothing is written for either."""
    from tasks.preflight import job_workload
    from tasks.run_folder import open_run as open_recorded
    from tasks.sizing import planned_workload

    if not args.job.endswith(_JOB_SUFFIXES):
        store, record = open_recorded(args.job, storage_of(args))
        return job_of(record), planned_workload(store)
    job, progress = load_job(args.job), Progress()
    with signals(), scratch_folder() as work_dir, console.show(progress, as_json=args.json):
        return job, job_workload(job, work_dir=work_dir, progress=progress)


def bench(args: argparse.Namespace) -> int:
    """Measure an engine on this machine over mixes of requests."""
    info, results = _measure(args)
    document = {
        "model": args.model,
        "engine": {name: getattr(info, name) for name in _ENGINE_FIELDS},
        "mixes": [result.to_json() for result in results],
    }
    if args.json:
        print(json.dumps(document))
    else:
        console.print_bench(info, results)
    return EXIT_OK


def _measure(args: argparse.Namespace) -> tuple[BackendInfo, list[MixResult]]:
    """Stage the model, build the engine, run the mixes."""
    from inference.backends import create_backend
    from inference.config import EngineConfig
    from inference.model_config import vocab_size_of
    from inference.weights import check_small_files
    from tasks.bench import bench as run_mixes
    from tasks.bench import parse_mix
    from tasks.stage import stage as stage_model

    mixes = [parse_mix(text) for text in args.mixes or ["chat:64"]]
    if args.repeat < 1:
        raise JobError(f"--repeat is {args.repeat}; give 1 or more")
    with stage_model(
        args.model,
        storage=storage_of(args),
        stage_to=args.to,
        allowed_code=args.allowed_code,
    ) as staged:
        config = EngineConfig(
            model=str(staged.path),
            backend=args.backend,
            dtype=args.dtype,
            allowed_code=tuple(args.allowed_code),
            quantization=args.quantization,
            kv_cache_dtype=args.kv_cache_dtype,
            tensor_parallel_size=args.tensor_parallel_size,
        )
        vocab_size = vocab_size_of(check_small_files(staged.path, args.allowed_code).config)
        if vocab_size is None:
            raise JobError(f"{args.model}: its config.json has no vocab_size; give a text model")
        backend = create_backend(config)
        try:
            results = run_mixes(backend, mixes, vocab_size=vocab_size, repeat=args.repeat)
        finally:
            backend.close()
        return backend.info, results


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Paths as text, so that the document is JSON."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
