"""What each command does. Imported after the arguments are known to be right."""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from flows import console
from flows.cli import (
    EXIT_FAILED_ROWS,
    EXIT_OK,
    EXIT_PARTIAL,
    EXIT_REFUSED,
    EXIT_UNVERIFIED,
)
from flows.config import JobError, load_job
from flows.model_commands import bench as bench
from flows.model_commands import stage as stage
from flows.model_commands import tiers as tiers
from flows.night_commands import cancel as cancel
from flows.night_commands import deploy as deploy
from flows.night_commands import open_run, print_document
from flows.night_commands import submit as submit
from inference.errors import InferenceError
from storage import keys
from storage.commits import CommitCache
from storage.errors import StorageError
from storage.object_store import ObjectStore
from tasks.budget import BudgetSpent
from tasks.job_variables import ProvisionError
from tasks.progress import Progress
from tasks.scratch import scratch_folder
from tasks.stop import Broken, Stopped, StopSignal

_ORPHAN_GRACE_S = 60.0

if TYPE_CHECKING:
    from tasks.orchestrate import Ended

REFUSALS = (JobError, StorageError, InferenceError, ProvisionError, BudgetSpent, Broken)
STOPS = (Stopped, KeyboardInterrupt)


class Stop(StopSignal):
    """Set by the first SIGINT or SIGTERM; remembers which. A second one ends the process at once."""

    signum: int = signal.SIGINT

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler.

        Raises:
            Stopped: nobody watches, as while planning: the step in hand is given up.
        """
        if self.is_set():
            console.show_cursor()
            os._exit(128 + signum)
        self.signum = signum
        self.set()
        if not self.is_watched:
            raise Stopped

    def follow_parent(self) -> None:
        """Stop when standard input closes, as it does when the process that started this one ends."""
        threading.Thread(target=self._follow, name="nightjar-parent", daemon=True).start()

    def _follow(self) -> None:
        while os.read(sys.stdin.fileno(), 4096):
            continue
        self.signum = signal.SIGTERM
        self.set()
        time.sleep(_ORPHAN_GRACE_S)
        os._exit(128 + signal.SIGTERM)


_stop = Stop()


def run(args: argparse.Namespace) -> int:
    """Plan, drain and publish one job in this process; as a flow run if a Prefect API is configured."""
    from tasks.orchestrate import generate

    job = load_job(args.job, overrides=args.overrides)
    progress = Progress()
    with _signals(), console.show(progress, as_json=args.json):
        if os.environ.get("PREFECT_API_URL"):
            from flows.batch_generate import generate_here
            from flows.server import check_server

            check_server()
            ended = generate_here(
                str(args.job), args.overrides, progress=progress, should_stop=_stop
            )
        else:
            if job.hardware.provider != "local":
                raise JobError(
                    f"hardware.provider: {job.hardware.provider} starts replicas through Prefect; set "
                    "PREFECT_API_URL, or give --set hardware.provider=local"
                )
            ended = generate(job, progress=progress, should_stop=_stop)
    return _conclude(args, ended)


def plan(args: argparse.Namespace) -> int:
    """Say what a job would do; runs nothing and writes nothing into its output."""
    from tasks.preflight import preflight
    from tasks.preflight_text import preflight_lines

    job = load_job(args.job, overrides=args.overrides)
    progress = Progress()
    with _signals(), scratch_folder() as work_dir, console.show(progress, as_json=args.json):
        found = preflight(job, work_dir=work_dir, progress=progress, hardware=args.hardware)
    print_document(args, found.as_document(), "\n".join(preflight_lines(found)))
    return EXIT_OK


def retry(args: argparse.Namespace) -> int:
    """Finish what is missing, redo failed rows in place, publish again."""
    from tasks.orchestrate import redo

    store, record = open_run(args)
    job = load_job(record.job)
    progress = Progress()
    with _signals(), console.show(progress, as_json=args.json):
        ended = redo(job, store, progress=progress, should_stop=_stop)
    return _conclude(args, ended)


def drain(args: argparse.Namespace) -> int:
    """Join a planned run as one more replica; never publishes."""
    from tasks.drain import drain as drain_run
    from tasks.drain import new_invocation
    from tasks.run import attach

    store, record = open_run(args)
    job = load_job(record.job)
    progress = Progress()
    if args.with_parent:
        _stop.follow_parent()
    with _signals(), scratch_folder() as work_dir, console.show(progress, as_json=args.json):
        this_run = attach(job, record, store, work_dir=work_dir, progress=progress)
        try:
            report = drain_run(
                this_run,
                invocation=args.invocation or new_invocation(),
                progress=progress,
                should_stop=_stop,
            )
        finally:
            this_run.close()
    document = {"outcomes": dict(report.outcomes), "failed_shards": report.exhausted}
    print_document(args, document, f"shards: {dict(report.outcomes) or 'none left'}")
    return EXIT_PARTIAL if report.exhausted else EXIT_OK


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
    with _signals():
        while True:
            found = run_status(store, cache=cache)
            text = json.dumps(found.as_document()) if args.json else console.status_line(found)
            try:
                print(text, flush=True)
            except BrokenPipeError:  # whoever read has seen enough, as `head` does
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return EXIT_OK if found.is_published else EXIT_PARTIAL
            if found.is_published:
                return EXIT_OK
            if _stop.wait(max(0.2, args.every)):
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
    from storage.garbage import collect_garbage

    store, _ = open_run(args)
    removed = collect_garbage(store, dry_run=args.dry_run)
    verb = "would delete" if args.dry_run else "deleted"
    text = f"{verb} {len(removed.keys)} objects, {removed.num_bytes:,} bytes"
    print_document(args, {"dry_run": args.dry_run, "keys": list(removed.keys)}, text)
    return EXIT_OK


def _gc_models(args: argparse.Namespace) -> int:
    from storage import model_caches
    from tasks.stage import describe_evictions

    if args.dry_run:
        raise JobError(
            "gc --dry-run: give a run folder; `nightjar stage --list` shows staged models"
        )
    removed = model_caches.gc(roots=model_caches.roots_of(args.to))
    document = {"evicted": [eviction._asdict() for eviction in removed]}
    print_document(args, document, describe_evictions(removed))
    return EXIT_OK


def refuse(args: argparse.Namespace, error: BaseException) -> int:
    """One line on what is wrong and what to change."""
    if getattr(args, "json", False):
        print(json.dumps({"error": str(error), "kind": type(error).__name__}))
    print(f"nightjar {args.command}: {error}", file=sys.stderr)
    # A store that was there at the start and went away leaves a run that can be resumed.
    return EXIT_PARTIAL if getattr(error, "retryable", False) else EXIT_REFUSED


def stopped(args: argparse.Namespace, stop: BaseException) -> int:
    """Stopped by a signal or a cancellation: leases are released, what is committed stays."""
    if isinstance(stop, Stopped) and not _stop.is_set():
        print(f"nightjar {args.command}: cancelled; run the same again to go on", file=sys.stderr)
        return EXIT_PARTIAL
    name = signal.Signals(_stop.signum).name
    print(
        f"nightjar {args.command}: stopped by {name}; run the same again to go on", file=sys.stderr
    )
    return 128 + _stop.signum


def _conclude(args: argparse.Namespace, ended: "Ended") -> int:
    from tasks.publish import num_failed
    from tasks.status import run_status

    found = run_status(ended.store, cache=ended.commit_cache)
    if args.json:
        failed = {f"{shard_id:05d}": error for shard_id, error in ended.exhausted.items()}
        print(json.dumps({**found.as_document(), "failed_shards": failed}))
    else:
        console.print_outcome(found, ended.exhausted, console.samples(ended.store))
    if ended.manifest is None:
        return EXIT_PARTIAL
    if not ended.is_within_limit:
        print(
            f"nightjar {args.command}: {num_failed(ended.manifest)} rows failed, max_failed_rows "
            f"allows {ended.job.max_failed_rows}",
            file=sys.stderr,
        )
        return EXIT_FAILED_ROWS
    return EXIT_OK


@contextmanager
def _signals() -> Iterator[None]:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    old = {s: signal.signal(s, _stop.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
