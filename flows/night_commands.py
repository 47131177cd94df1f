"""Commands for the nights: stop a run, drop a file into the inbox, set up a Prefect server."""

import argparse
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli import EXIT_OK
from flows.config import JobError, read_values
from storage.object_store import StorageConfig, open_store
from tasks.deadline import next_time

if TYPE_CHECKING:
    from tasks.run_folder import RunFolder


def cancel(args: argparse.Namespace) -> int:
    """Ask every replica there is now to stop; a later start goes on."""
    from tasks.cancel import cancel as cancel_run

    store, _ = open_run(args)
    cancel_run(store)
    print_document(
        args, {"run": store.uri, "is_cancelled": True}, f"{store.uri}: its replicas will stop"
    )
    return EXIT_OK


def submit(args: argparse.Namespace) -> int:
    """Drop a file into the inbox; the next scan answers with a letter."""
    from storage.formats import SUFFIXES
    from tasks.inbox import is_wanted
    from tasks.inbox import submit as drop

    where = args.inbox or os.environ.get("NIGHTJAR_INBOX")
    if not where:
        raise JobError("no inbox; give --inbox or set NIGHTJAR_INBOX")
    path = Path(args.file)
    if not path.is_file():
        raise JobError(f"{args.file}: not found; give a file of prompts")
    if not is_wanted(path.name):
        raise JobError(
            f"{path.name}: would stay in the inbox; name it {', '.join(SUFFIXES)}, without . or _ in front"
        )
    if args.after is not None:
        next_time(args.after, timezone="UTC", now=datetime.now(UTC))
    settings = read_values(args.job) if args.job else None
    inbox = open_store(where, storage_of(args))
    key = drop(inbox, path, settings=settings, after=args.after)
    text = f"{inbox.uri}/{key}: dropped; the letter will be under accepted/ or rejected/"
    print_document(args, {"inbox": inbox.uri, "key": key}, text)
    return EXIT_OK


def deploy(args: argparse.Namespace) -> int:
    """Set up a Prefect server; safe to repeat."""
    if not os.environ.get("PREFECT_API_URL"):
        raise JobError(
            "PREFECT_API_URL is not set; give the server, as in http://127.0.0.1:4200/api"
        )
    from flows.deploy import Settings, default_folder
    from flows.deploy import deploy as set_up
    from flows.server import check_server

    check_server()

    done = set_up(
        Settings(
            folder=Path(args.folder) if args.folder else default_folder(),
            providers=args.providers or ("process",),
            job=args.job,
            cron=args.cron,
            timezone=args.timezone,
            inbox=args.inbox,
            inbox_job=args.inbox_job,
            notify=args.notify,
            webhook=args.webhook,
        )
    )
    print_document(
        args, done, "\n".join(f"{kind}: {', '.join(names)}" for kind, names in done.items())
    )
    return EXIT_OK


def open_run(args: argparse.Namespace) -> "RunFolder":
    """Open the run folder that a command names, as its record says."""
    from tasks.run_folder import open_run as open_recorded

    return open_recorded(args.run, storage_of(args))


def storage_of(args: argparse.Namespace) -> StorageConfig:
    """Return how to reach object storage; what is not given is the usual AWS environment's."""
    return StorageConfig(endpoint_url=args.endpoint_url, profile=args.profile)


def print_document(args: argparse.Namespace, document: dict[str, Any], text: str) -> None:
    """Print one JSON document when asked for, else the text."""
    print(json.dumps(document) if args.json else text)
