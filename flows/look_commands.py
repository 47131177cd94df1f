"""Commands that look at a run folder, prove it or tidy it: nothing is generated."""

import argparse
import json
from pathlib import Path

from flows import console
from flows.cli import EXIT_OK, EXIT_PARTIAL, EXIT_UNVERIFIED
from flows.config import JobError
from flows.night_commands import open_run, print_document
from flows.signals import signals, stop
from flows.streams import output_is_lost
from storage import keys
from storage.commits import CommitCache
from storage.object_store import ObjectStore
from tasks.scratch import scratch_folder
from tasks.stop import Stopped


def status(args: argparse.Namespace) -> int:
    """Say how far a run is; reads the store, never Prefect."""
    from tasks.status import run_status

    store, _ = open_run(args)
    if args.watch:
        return _watch_status(args, store)
    found = run_status(store)
    if args.json:
        print(json.dumps(found.as_document()))
    else:
        console.print_status(found)
    return EXIT_OK if found.is_published else EXIT_PARTIAL


def _watch_status(args: argparse.Namespace, store: ObjectStore) -> int:
    """One line (or JSON document) at a time, until the run is published or a signal comes."""
    from tasks.status import run_status

    cache: CommitCache = {}
    with signals():
        while True:
            found = run_status(store, cache=cache)
            text = json.dumps(found.as_document()) if args.json else console.status_line(found)
            print(text, flush=True)
            if found.is_published:
                return EXIT_OK
            if output_is_lost():  # whoever read has seen enough, as `head` does
                return EXIT_PARTIAL
            if stop.wait(max(0.2, args.every)):
                raise Stopped


def verify(args: argparse.Namespace) -> int:
    """Prove what is stored."""
    from tasks.verify import verify_run

    store, _ = open_run(args)
    with scratch_folder() as work_dir:
        found = verify_run(store, work_dir)
    document = {
        "run": store.uri,
        "is_whole": found.is_whole,
        "is_published": found.is_published,
        "num_parts": found.num_parts,
        "num_rows": found.num_rows,
        "rows_by_state": dict(found.counts),
        "missing_shards": found.missing_shards,
        "violations": found.violations,
    }
    if args.json:
        print(json.dumps(document))
    else:
        console.print_verification(store.uri, found)
    if found.violations:
        return EXIT_UNVERIFIED
    return EXIT_OK if found.is_whole else EXIT_PARTIAL


def report(args: argparse.Namespace) -> int:
    """Draw a run's report and store it beside the run; any run that is planned has one."""
    from tasks.report import write_report

    store, _ = open_run(args)
    page = write_report(store)
    place = f"{store.uri}/{keys.REPORT}"
    if args.out is not None:
        try:
            Path(args.out).write_bytes(page)
        except OSError as error:
            raise JobError(
                f"--out {args.out}: {error.strerror}; the report is at {place}"
            ) from None
    print_document(args, {"run": store.uri, "report": place, "out": args.out}, f"report  {place}")
    return EXIT_OK


def gc(args: argparse.Namespace) -> int:
    """Delete what lost attempts of a run, or abandoned staging on this machine, left behind."""
    if args.run is None:
        return _gc_models(args)
    if args.budget is not None:
        raise JobError("gc --budget: is for staged models; leave out the run folder")
    from storage.garbage import collect_garbage

    store, _ = open_run(args)
    removed = collect_garbage(store, dry_run=args.dry_run)
    verb = "would delete" if args.dry_run else "deleted"
    text = f"{verb} {len(removed.keys)} objects, {removed.num_bytes:,} bytes"
    print_document(args, {"dry_run": args.dry_run, "keys": list(removed.keys)}, text)
    return EXIT_OK


def _gc_models(args: argparse.Namespace) -> int:
    from storage import model_caches
    from storage.sizes import parse_bytes
    from tasks.stage import describe_evictions

    removed = model_caches.gc(
        budget_bytes=parse_bytes(args.budget, name="--budget"),
        dry_run=args.dry_run,
        roots=model_caches.roots_of(args.to),
    )
    document = {
        "dry_run": args.dry_run,
        "evicted": [eviction._asdict() for eviction in removed],
    }
    print_document(args, document, describe_evictions(removed, dry_run=args.dry_run))
    return EXIT_OK
