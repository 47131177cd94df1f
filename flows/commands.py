"""What each command does. Imported after the arguments are known to be right."""

import argparse
import json
import os
import signal
import sys
from typing import TYPE_CHECKING

from flows import console
from flows.cli import (
    EXIT_FAILED_ROWS,
    EXIT_OK,
    EXIT_PARTIAL,
    EXIT_REFUSED,
)
from flows.config import JobError, load_job
from flows.look_commands import gc as gc
from flows.look_commands import report as report
from flows.look_commands import status as status
from flows.look_commands import verify as verify
from flows.model_commands import bench as bench
from flows.model_commands import stage as stage
from flows.model_commands import tiers as tiers
from flows.night_commands import cancel as cancel
from flows.night_commands import deploy as deploy
from flows.night_commands import open_run, print_document
from flows.night_commands import submit as submit
from flows.signals import signals, stop
from inference.errors import InferenceError
from storage.errors import StorageError
from tasks.budget import BudgetSpent
from tasks.job_variables import ProvisionError
from tasks.progress import Progress
from tasks.scratch import scratch_folder
from tasks.stop import Broken, Stopped

if TYPE_CHECKING:
    from tasks.orchestrate import Ended

REFUSALS = (JobError, StorageError, InferenceError, ProvisionError, BudgetSpent, Broken)
STOPS = (Stopped, KeyboardInterrupt)


def run(args: argparse.Namespace) -> int:
    """Plan, drain and publish one job in this process; as a flow run if a Prefect API is configured."""
    from tasks.orchestrate import generate

    job = load_job(args.job, overrides=args.overrides)
    progress = Progress()
    with signals(), console.show(progress, as_json=args.json):
        if os.environ.get("PREFECT_API_URL"):
            from flows.batch_generate import generate_here
            from flows.server import check_server

            check_server()
            ended = generate_here(
                str(args.job), args.overrides, progress=progress, should_stop=stop
            )
        else:
            if job.hardware.provider != "local":
                raise JobError(
                    f"hardware.provider: {job.hardware.provider} starts replicas through Prefect; set "
                    "PREFECT_API_URL, or give --set hardware.provider=local"
                )
            ended = generate(job, progress=progress, should_stop=stop)
    return _conclude(args, ended)


def plan(args: argparse.Namespace) -> int:
    """Say what a job would do; runs nothing and writes nothing into its output."""
    from tasks.preflight import preflight
    from tasks.preflight_text import preflight_lines

    job = load_job(args.job, overrides=args.overrides)
    progress = Progress()
    with signals(), scratch_folder() as work_dir, console.show(progress, as_json=args.json):
        found = preflight(job, work_dir=work_dir, progress=progress)
    print_document(args, found.as_document(), "\n".join(preflight_lines(found)))
    return EXIT_OK


def retry(args: argparse.Namespace) -> int:
    """Finish what is missing, redo failed rows in place, publish again."""
    from tasks.orchestrate import redo

    store, record = open_run(args)
    job = load_job(record.job)
    progress = Progress()
    with signals(), console.show(progress, as_json=args.json):
        ended = redo(job, store, progress=progress, should_stop=stop)
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
        stop.follow_parent()
    with signals(), scratch_folder() as work_dir, console.show(progress, as_json=args.json):
        this_run = attach(job, record, store, work_dir=work_dir, progress=progress)
        try:
            report = drain_run(
                this_run,
                invocation=args.invocation or new_invocation(),
                progress=progress,
                should_stop=stop,
            )
        finally:
            this_run.close()
    document = {"outcomes": dict(report.outcomes), "failed_shards": report.exhausted}
    print_document(args, document, f"shards: {dict(report.outcomes) or 'none left'}")
    return EXIT_PARTIAL if report.exhausted else EXIT_OK


def refuse(args: argparse.Namespace, error: BaseException) -> int:
    """One line on what is wrong and what to change."""
    if getattr(args, "json", False):
        print(json.dumps({"error": str(error), "kind": type(error).__name__}))
    print(f"nightjar {args.command}: {error}", file=sys.stderr)
    # A store that was there at the start and went away leaves a run that can be resumed.
    return EXIT_PARTIAL if getattr(error, "retryable", False) else EXIT_REFUSED


def stopped(args: argparse.Namespace, error: BaseException) -> int:
    """Stopped by a signal or a cancellation: leases are released, what is committed stays."""
    if isinstance(error, Stopped) and not stop.is_set():
        print(f"nightjar {args.command}: cancelled; run the same again to go on", file=sys.stderr)
        return EXIT_PARTIAL
    name = signal.Signals(stop.signum).name
    print(
        f"nightjar {args.command}: stopped by {name}; run the same again to go on", file=sys.stderr
    )
    return 128 + stop.signum


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
