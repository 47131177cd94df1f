"""The command line of `nightjar`: every command with its options and what is said of them.

Only the standard library is imported, so that `--help` answers at once.
"""

import argparse
import json

_EXIT_CODES = """\
exit codes:
  0          published, or done
  1          a fault of Nightjar's own
  2          nothing was run: the job, the input or the model is wrong; the message says what to change
  3          partial, or a store was away, or the canary's engine broke: run the same again to go on
  4          verification failed
  5          published, but more rows failed than max_failed_rows allows
  130, 143   stopped by a signal, resumable
None of them changes because standard output cannot be written (a full disk, a closed pipe), but what
only tells, such as plan and status, ends with 1 on a full disk.
"""
_MODEL_HELP = "folder, s3:// prefix, hf://repo@revision or GGUF file"
_RUN_HELP = "run folder: OUTPUT_URI/RUN_ID, local or s3://"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; handlers are named, not imported."""
    parser = argparse.ArgumentParser(
        prog="nightjar",
        description="Offline batch inference: Parquet prompts in, Parquet completions out, exactly once.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_jobs(commands)
    _add_runs(commands)
    _add_models(commands)
    _add_submit(commands)
    _add_deploy(commands)
    return parser


class _ShowVersion(argparse.Action):
    """Looked up only when asked for: the metadata of what is installed takes a while to read."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("nightjar")
        except PackageNotFoundError:
            found = "of a checkout that is not installed"
        print(f"nightjar {found}")
        parser.exit()


class _SetHardware(argparse.Action):
    """`--hardware FILE` is one more override."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        namespace.overrides = [*namespace.overrides, f"hardware.file={json.dumps(values)}"]


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return parser


def _add_jobs(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands that take a job file."""
    run = _command(commands, "run", "generate a completion for every row; run again to resume")
    plan = _command(
        commands, "plan", "say what a job would do, take and cost; no GPU, nothing written"
    )
    for command in (run, plan):
        command.add_argument("job", help="job file (YAML)")
        _add_overrides(command)


def _add_runs(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands that take a run folder."""
    status = _command(commands, "status", "say how far a run is, from the store alone")
    status.add_argument("--watch", action="store_true", help="go on until it is published")
    status.add_argument(
        "--every",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="between two lines of --watch; default: 5",
    )
    retry = _command(commands, "retry", "finish missing shards and redo failed rows in place")
    verify = _command(commands, "verify", "re-read everything stored and prove it whole")
    report = _command(commands, "report", "draw a run's report as one page, report.html")
    report.add_argument("--out", metavar="FILE", help="write it to this file too")
    drain = _command(commands, "drain", "join a planned run as one more replica")
    drain.add_argument("--invocation", help="name of the start this replica belongs to")
    drain.add_argument(
        "--with-parent", action="store_true", help="stop when standard input is closed"
    )
    cancel = _command(commands, "cancel", "stop every replica of a run, wherever it runs")
    for command in (status, retry, verify, report, drain, cancel):
        command.add_argument("run", help=_RUN_HELP)
    gc = _command(
        commands,
        "gc",
        "delete what lost attempts of a run, or staging on this machine, left behind",
    )
    gc.add_argument("run", nargs="?", help=f"{_RUN_HELP}; without it, this machine's staged models")
    gc.add_argument("--dry-run", action="store_true", help="only list what would be deleted")
    gc.add_argument("--to", default="auto", help="the folder that models were staged to, if named")
    gc.add_argument(
        "--budget",
        metavar="SIZE",
        help="most that staged models may take in one cache, such as 200GB: least recently used go",
    )
    for command in (status, retry, verify, report, drain, cancel, gc):
        _add_storage(command)


def _add_models(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands that take a model."""
    stage = _command(
        commands, "stage", "bring model weights to this machine's fastest disk, verified"
    )
    stage.add_argument("model", nargs="?", help=_MODEL_HELP)
    stage.add_argument(
        "--to",
        default="auto",
        help="auto (default), shm, nvme, none or a folder; also where --list, --pin and --evict look",
    )
    stage.add_argument(
        "--budget",
        metavar="SIZE",
        help="most that staged models may take there, such as 200GB: least recently used go",
    )
    stage.add_argument("--list", action="store_true", help="list what is staged")
    stage.add_argument("--pin", action="store_true", help="stage, and never evict")
    stage.add_argument("--unpin", action="store_true", help="let a pinned model be evicted again")
    stage.add_argument("--evict", action="store_true", help="remove a staged model nobody reads")
    tiers = _command(
        commands, "tiers", "say on which GPUs a model fits, how fast and at what price"
    )
    tiers.add_argument("model", help=f"{_MODEL_HELP}; only its config.json is read")
    tiers.add_argument(
        "--for",
        dest="job",
        metavar="JOB",
        help="job file, or planned run, whose token counts to use",
    )
    tiers.add_argument(
        "--hardware",
        metavar="FILE",
        help="hardware file (YAML); default: the job's, or the one that comes along",
    )
    tiers.add_argument("--all", action="store_true", help="every GPU count, not only the smallest")
    bench = _command(
        commands, "bench", "measure an engine on this machine, completions of forced lengths"
    )
    _add_bench(bench)
    for command in (stage, bench):
        command.add_argument(
            "--allow-code",
            action="append",
            default=[],
            dest="allowed_code",
            metavar="SHA256",
            help="of a config file that may name code: it is not run, transformers' own class is loaded",
        )
    for command in (stage, tiers, bench):
        _add_storage(command)


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("model", help=_MODEL_HELP)
    bench.add_argument(
        "--mix",
        action="append",
        dest="mixes",
        metavar="MIX:REQUESTS",
        help="uniform, chat or template, and how many; may be repeated; default: chat:64",
    )
    bench.add_argument(
        "--repeat", type=int, default=1, help="times a mix is run; the median counts; default: 1"
    )
    bench.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "paged", "zero", "transformers"),
        help="what runs the model; default: auto, paged on CUDA and else transformers",
    )
    bench.add_argument(
        "--dtype",
        default="auto",
        help="bfloat16, float16 or float32; default: auto, what the model's config says",
    )
    bench.add_argument(
        "--quantization",
        default="none",
        choices=("none", "fp8", "int8", "nf4"),
        help="of the weights; default: none",
    )
    bench.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=("auto", "fp8"),
        help="of the KV cache; default: auto, the model's dtype",
    )
    bench.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="DEVICES",
        help="devices that hold the model between them; default: 1",
    )
    bench.add_argument(
        "--to", default="auto", help="where to stage: auto (default), shm, nvme, none or a folder"
    )


def _add_submit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    submit = _command(commands, "submit", "drop a file of prompts into the inbox")
    submit.add_argument("file", help="Parquet, JSONL or CSV file of prompts")
    submit.add_argument("--inbox", help="inbox prefix; default: $NIGHTJAR_INBOX")
    submit.add_argument("--job", help="job file whose settings go over the inbox's own")
    submit.add_argument("--after", help="not before this time of day, such as 20:00 Europe/Berlin")
    _add_storage(submit)


def _add_deploy(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    deploy = _command(
        commands, "deploy", "set up Prefect's work pools, deployments and automations"
    )
    deploy.add_argument(
        "--folder", help="folder of prefect.yaml; default: the one that comes along"
    )
    deploy.add_argument(
        "--provider",
        action="append",
        dest="providers",
        choices=("process", "kubernetes", "ecs", "command"),
        help="how replicas get machines; may be repeated; default: process",
    )
    deploy.add_argument("--job", help="job file of the nightly deployment, as its worker sees it")
    deploy.add_argument("--cron", default="0 22 * * *", help="when it starts; default: 0 22 * * *")
    deploy.add_argument(
        "--timezone", default="UTC", help="of --cron, such as Europe/Berlin; default: UTC"
    )
    deploy.add_argument("--inbox", help="prefix to look for dropped files")
    deploy.add_argument("--inbox-job", help="job file whose settings dropped files get")
    deploy.add_argument("--notify", help="notification block that hears of failures: TYPE/NAME")
    deploy.add_argument("--webhook", help="URL that hears of failures")


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint-url", help="S3 endpoint for stores that are not AWS")
    parser.add_argument("--profile", help="named profile in the AWS configuration files")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override one setting, such as --set sampling.max_tokens=64; may be repeated",
    )
    parser.add_argument(
        "--hardware",
        action=_SetHardware,
        metavar="FILE",
        help="hardware file (YAML); the same as --set hardware.file=FILE",
    )
