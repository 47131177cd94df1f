"""`nightjar deploy`: work pools, deployments and automations of one Prefect server; safe to repeat.

What is there is brought in line, nothing is deleted, and a limit that somebody set on a pool stays. A
schedule becomes active when its job is given, and keeps the time zone it was given.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import yaml
from prefect import get_client
from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from flows.command_worker import CommandWorker
from flows.config import JobError, load_job
from flows.fleet import patiently
from flows.inbox_jobs import InboxJobs
from flows.served import check_paths, fixed
from tasks.job_variables import ProvisionError

CONTROL_POOL = "nightjar"
PROVIDERS = ("process", "kubernetes", "ecs", "command")
_FLOWS = ["batch-generate", "generate-shards", "retry-failed", "scan-inbox", "stage-weights"]
_DEPLOYMENT_OF = {"process": "replica"} | {name: name for name in PROVIDERS[1:]}
_SILENT = timedelta(seconds=120)  # four heartbeats of 30 s
_PAUSES_S = (2, 5, 10)
_CORE = AutomationCore.model_fields
_ENDED = ("Completed", "Failed", "Cancelled", "Crashed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to set up."""

    folder: Path
    """Holds prefect.yaml and the base job templates."""

    providers: Sequence[str] = ("process",)
    job: str | None = None
    """Job file of the nightly deployment, as the workers see it."""

    cron: str = "0 22 * * *"
    timezone: str = "UTC"
    inbox: str | None = None
    """Prefix to look for dropped files."""

    inbox_job: str | None = None
    """Job file whose settings dropped files get."""

    notify: str | None = None
    """A notification block, such as slack-webhook/on-call or sendgrid-email/on-call."""

    webhook: str | None = None
    """URL that gets a JSON document when a flow run fails."""


def deploy(settings: Settings) -> dict[str, list[str]]:
    """Set everything up and return the names of what is there now, by kind.

    Raises:
        JobError: a cron text or a time zone is wrong, or a file is missing.
        ProvisionError: a notification block does not exist, or Prefect refuses a deployment.
    """
    document = planned_deployments(settings)
    with get_client(sync_client=True) as client:
        pools = [_pool(client, name, kind, template) for name, kind, template in _pools(settings)]
        _deploy(document)
        automations = [_automation(client, wanted) for wanted in _automations(client, settings)]
    names = [str(item["name"]) for item in document["deployments"]]
    return {"work_pools": pools, "deployments": names, "automations": automations}


def default_folder() -> Path:
    """Return `deployments/` of this folder, of the checkout, or of the image."""
    candidates = [
        Path("deployments"),
        Path(__file__).parents[1] / "deployments",
        Path(sys.prefix) / "deployments",
    ]
    for folder in candidates:
        if (folder / "prefect.yaml").exists():
            return folder
    raise JobError(
        f"no prefect.yaml in {', '.join(str(folder) for folder in candidates)}; give --folder"
    )


def planned_deployments(settings: Settings) -> dict[str, Any]:
    """Return prefect.yaml as it will be deployed. Raises JobError as `deploy` does."""
    _check_schedule(settings)
    path = settings.folder / "prefect.yaml"
    try:
        document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}; give --folder") from error
    unwanted = {name for kind, name in _DEPLOYMENT_OF.items() if kind not in settings.providers}
    if "process" not in settings.providers:
        unwanted.add("stage")
    document["deployments"] = [d for d in document["deployments"] if d["name"] not in unwanted]
    for deployment in document["deployments"]:
        if deployment["name"] == "nightly" and settings.job is not None:
            deployment["parameters"] = {"job": fixed(settings.job)}
            deployment["schedules"] = [
                {"cron": settings.cron, "timezone": settings.timezone, "active": True}
            ]
        if deployment["name"] == "inbox" and settings.inbox is not None:
            job = fixed(settings.inbox_job or "")
            deployment["parameters"] = {"inbox": fixed(settings.inbox), "job": job}
            deployment["schedules"] = [{"interval": 60, "active": True}]
    return document


def _check_schedule(settings: Settings) -> None:
    if settings.inbox is not None and settings.inbox_job is None:
        raise JobError("--inbox: give --inbox-job too, the job whose settings dropped files get")
    # A job file that only the workers see is checked by them.
    if settings.job is not None and Path(settings.job).exists():
        check_paths(load_job(settings.job))
    if settings.inbox_job is not None and Path(settings.inbox_job).exists():
        check_paths(InboxJobs.read(settings.inbox_job).any_job)
    try:
        CronSchedule(cron=settings.cron, timezone=settings.timezone)
    except ValidationError as error:
        raise JobError(
            f"--cron {settings.cron!r} --timezone {settings.timezone!r}: {error.errors()[0]['msg']}; "
            "write them as in '0 22 * * *' and Europe/Berlin"
        ) from error


def _pools(settings: Settings) -> list[tuple[str, str, dict[str, Any]]]:
    pools = [(CONTROL_POOL, "process", ProcessWorker.get_default_base_job_template())]
    for kind in settings.providers:
        if kind == "process":
            template = ProcessWorker.get_default_base_job_template()
        elif kind == "command":
            template = CommandWorker.get_default_base_job_template()
        else:
            template = json.loads((settings.folder / f"{kind}.json").read_text(encoding="utf-8"))
        pools.append((f"gpu-{kind}", kind, template))
    return pools


def _pool(client: SyncPrefectClient, name: str, kind: str, template: dict[str, Any]) -> str:
    try:
        found = patiently(lambda: client.read_work_pool(name))
    except ObjectNotFound:
        wanted = WorkPoolCreate(name=name, type=kind, base_job_template=template)
        patiently(lambda: client.create_work_pool(wanted, overwrite=True))
        return name
    if found.type != kind:
        raise ProvisionError(
            f"work pool {name} is of type {found.type}, Nightjar wants {kind}; rename or delete it"
        )
    patiently(lambda: client.update_work_pool(name, WorkPoolUpdate(base_job_template=template)))
    return name


def _deploy(document: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefect.yaml"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        command += ["--prefect-file", str(path)]
        done = _call(command)
        for pause_s in _PAUSES_S:
            # A loaded SQLite is locked now and then; deploying again changes nothing that is there.
            said = " ".join((done.stdout + done.stderr).split())
            if done.returncode == 0 or "503 Service Unavailable" not in said:
                break
            time.sleep(pause_s)
            done = _call(command)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise ProvisionError(f"prefect deploy ended with {done.returncode}: {said[-500:]}")


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PREFECT_CLI_COLORS": "false"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def _automations(client: SyncPrefectClient, settings: Settings) -> list[AutomationCore]:
    of_flows = ResourceSpecification(
        {"prefect.resource.role": "flow", "prefect.resource.name": _FLOWS}
    )
    silent = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={f"prefect.flow-run.{state}" for state in ("heartbeat", *_ENDED)},
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=of_flows,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=_SILENT,
    )
    crash = ChangeFlowRunState(
        name="Crashed",
        state=StateType.CRASHED,
        message=f"no heartbeat for {_SILENT.total_seconds():.0f} s",
        force=False,
    )
    wanted = [
        AutomationCore(
            name="nightjar: silent flow runs are crashed",
            description="A machine that vanished says nothing; the run itself is resumed from its store.",
            trigger=silent,
            actions=[crash],
        )
    ]
    failed = EventTrigger(
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=of_flows,
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )
    for name, block in _blocks(client, settings):
        notification = SendNotification(
            block_document_id=block,
            subject="Nightjar: {{ flow.name }} {{ flow_run.state.name }}",
            body="{{ flow_run.name }}: {{ flow_run.state.message }}",
        )
        wanted.append(
            AutomationCore(
                name=f"nightjar: failures to {name}", trigger=failed, actions=[notification]
            )
        )
    return wanted


def _blocks(client: SyncPrefectClient, settings: Settings) -> list[tuple[str, Any]]:
    """Return the notification blocks wanted, by name and id; the webhook's is made here."""
    found = []
    if settings.notify is not None:
        kind, _, name = settings.notify.partition("/")
        try:
            block = patiently(lambda: client.read_block_document_by_name(name, kind))
        except ObjectNotFound:
            raise ProvisionError(
                f"--notify {settings.notify}: no such block; make one as in `prefect block create "
                "slack-webhook`, and give TYPE/NAME"
            ) from None
        found.append((settings.notify, block.id))
    if settings.webhook is not None:
        from prefect.blocks.notifications import CustomWebhookNotificationBlock

        block_id = CustomWebhookNotificationBlock(
            name="nightjar",
            url=settings.webhook,
            headers=None,
            cookies=None,
            json_data={"subject": "{{subject}}", "body": "{{body}}"},
        ).save("nightjar-webhook", overwrite=True)
        found.append(("webhook", cast("UUID", block_id)))
    return found


def _automation(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    standing = patiently(lambda: client.read_automations_by_name(wanted.name))
    if not standing:
        patiently(lambda: client.create_automation(wanted))
    elif _content(standing[0]) != _content(wanted):
        # One that is as wanted is left alone: an update forgets what its trigger has seen so far.
        patiently(lambda: client.update_automation(standing[0].id, wanted))
    return wanted.name


def _content(automation: AutomationCore) -> Any:
    """Return what can be compared. Not as JSON: a set is a list there, in an order that means nothing."""
    core = AutomationCore.model_validate(automation.model_dump(include=set(_CORE)))
    return _without_ids(core.model_dump())


def _without_ids(value: Any) -> Any:
    """Drop what the server numbers anew: each trigger's own id."""
    if isinstance(value, dict):
        return {key: _without_ids(item) for key, item in value.items() if key != "id"}
    return [_without_ids(item) for item in value] if isinstance(value, list) else value
