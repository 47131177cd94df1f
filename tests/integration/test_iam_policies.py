"""The policies in deployments/iam: each role's are enough for a whole run, needed, and nothing more.

The S3 server that enforces them is moto, which knows actions and resources but no conditions: the
statements with one (a commit must be create-only) are checked for their form only.
"""

import fnmatch
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from moto.core.authorization import disable_iam_authentication, enable_iam_authentication
from moto.core.botocore_stubber import MockRawResponse

from flows.cli import main
from flows.config import load_job
from storage import keys
from storage.commits import current_commits
from storage.errors import AccessDenied
from storage.manifest import digest
from storage.object_store import StorageConfig, open_store
from storage.s3_client import make_client
from tasks.drain import drain, new_invocation
from tasks.orchestrate import Ended, generate
from tasks.progress import Progress
from tasks.publish import reveal_all
from tasks.run import Run, attach
from tasks.run_folder import open_run
from tasks.run_record import read_record
from tasks.stop import StopSignal
from tasks.try_canary import try_canary
from tests.moto_in_turn import moto_in_turn
from tests.pipeline import MODELS

POLICIES = Path(__file__).parents[2] / "deployments" / "iam"
ROLES = ("planner", "worker", "collector")
PLACES = {
    "INPUT_BUCKET/INPUT_PREFIX": "prompts/night",
    "INPUT_BUCKET": "prompts",
    "MODEL_BUCKET/MODEL_PREFIX": "models/small",
    "MODEL_BUCKET": "models",
    "RESULT_BUCKET/RESULT_PREFIX": "results/runs",
    "RESULT_BUCKET": "results",
}
# What each request needs; the actions of the S3 documentation.
ACTIONS = {
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CopyObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
}


def policy(role: str) -> dict[str, Any]:
    text = (POLICIES / f"{role}.json").read_text()
    for name, value in PLACES.items():
        text = text.replace(name, value)
    assert not re.search(r"[A-Z]+_(BUCKET|PREFIX)", text), "a placeholder nobody knows"
    return dict(json.loads(text))


def statements(role: str) -> list[dict[str, Any]]:
    """The statements that moto understands."""
    return [found for found in policy(role)["Statement"] if "Condition" not in found]


@dataclass
class Cloud:
    """An account with three users, each with one of the policies, and what each of them asked for."""

    credentials: dict[str, tuple[str, str]]
    patch: pytest.MonkeyPatch
    role: str = ""
    asked: dict[str, set[tuple[str, str]]] = field(default_factory=dict)

    def become(self, role: str) -> None:
        self.role = role
        key, secret = self.credentials[role]
        self.patch.setenv("AWS_ACCESS_KEY_ID", key)
        self.patch.setenv("AWS_SECRET_ACCESS_KEY", secret)

    @contextmanager
    def acting_as(self, role: str) -> Iterator[None]:
        before = self.role
        self.become(role)
        try:
            yield
        finally:
            self.become(before)

    def watch(self) -> None:
        """Remember who asks for what, by the key that signs it."""
        signers = {key: role for role, (key, _) in self.credentials.items()}
        call = BaseClient._make_api_call  # type: ignore[attr-defined]

        def noting(client: Any, name: str, params: dict[str, Any]) -> Any:
            role = signers.get(client._request_signer._credentials.access_key, "root")
            assert name in ACTIONS, f"{name} is a request nobody thought of"
            place = "/".join(filter(None, [params["Bucket"], params.get("Key")]))
            self.asked.setdefault(role, set()).add((ACTIONS[name], place))
            if "CopySource" in params:
                source = params["CopySource"]
                self.asked[role].add(("s3:GetObject", f"{source['Bucket']}/{source['Key']}"))
            return call(client, name, params)

        self.patch.setattr(BaseClient, "_make_api_call", noting)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "root")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "root")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # What moto gives for a connection lacks what every connection has.
    monkeypatch.setattr(MockRawResponse, "release_conn", lambda self: None, raising=False)
    with moto_in_turn():
        s3, iam = (boto3.client(kind, region_name="us-east-1") for kind in ("s3", "iam"))
        for bucket in ("prompts", "models", "results"):
            s3.create_bucket(Bucket=bucket)
        credentials = {}
        for role in ROLES:
            iam.create_user(UserName=role)
            document = json.dumps({**policy(role), "Statement": statements(role)})
            iam.put_user_policy(UserName=role, PolicyName=role, PolicyDocument=document)
            key = iam.create_access_key(UserName=role)["AccessKey"]
            credentials[role] = (key["AccessKeyId"], key["SecretAccessKey"])
        for path in (MODELS / "chain-a").iterdir():
            s3.put_object(Bucket="models", Key=f"small/{path.name}", Body=path.read_bytes())
        lines = [json.dumps({"prompt": f"Tell me {row}"}) for row in range(40)]
        s3.put_object(Bucket="prompts", Key="night/in.jsonl", Body="\n".join(lines).encode())
        with enable_iam_authentication():
            found = Cloud(credentials, monkeypatch)
            found.watch()
            yield found


def whole_run(cloud: Cloud, folder: Path) -> Ended:
    """Plan and publish as the planner, drain as the worker, in places of their own."""
    job = load_job(
        {
            "name": "night",
            "model": {"source": "none"},
            "input": {"uri": "s3://prompts/night/"},
            "output": {"uri": "s3://results/runs"},
            "sampling": {"max_tokens": 2},
            "shards": {"max_rows": 20},
            "canary": {"rows": 4},
            "engine": {"backend": "dummy"},
            "storage": {"server_side_encryption": "AES256"},
        }
    )

    def drainer(run: Run) -> dict[int, str]:
        with cloud.acting_as("worker"):
            store = open_run(run.uri, StorageConfig()).store
            replica = attach(
                job, read_record(store), store, work_dir=folder / "worker", progress=Progress()
            )
            try:
                try_canary(replica, progress=Progress())
                done = drain(
                    replica,
                    invocation=new_invocation(),
                    progress=Progress(),
                    should_stop=StopSignal(),
                )
            finally:
                replica.close()
        return done.exhausted

    for name in ("planner", "worker"):
        (folder / name).mkdir()
    cloud.become("planner")
    return generate(job, progress=Progress(), should_stop=StopSignal(), drainer=drainer)


def covers(statement: dict[str, Any], action: str, place: str) -> bool:
    arn = f"arn:aws:s3:::{place}"
    return action in statement["Action"] and any(
        fnmatch.fnmatchcase(arn, pattern) for pattern in statement["Resource"]
    )


# Only used when something goes wrong, or by other commands: tried one by one below.
FOR_OTHER_DAYS = {"CancelReplicas", "GiveUpUploads"}


def test_a_whole_run_needs_each_statement_of_its_role_and_no_other(
    cloud: Cloud, tmp_path: Path
) -> None:
    ended = whole_run(cloud, tmp_path)
    assert ended.manifest is not None, ended.exhausted
    assert ended.manifest.num_rows == 40
    check_encrypted()
    for role in ("planner", "worker"):
        cloud.become(role)
        cache = str(tmp_path / role / "cache")
        assert main(["stage", "s3://models/small/", "--to", cache, "--json"]) == 0
    leave_garbage(ended.store.uri)
    hide_part(cloud, ended.store.uri)
    cloud.become("collector")
    assert main(["gc", ended.store.uri, "--json"]) == 0
    left = [info.key for info in open_store(ended.store.uri).list(keys.ATTEMPTS)]
    assert not [key for key in left if key.startswith("_attempts/00000/007/comp")]
    for role in ROLES:
        for statement in statements(role):
            used = [item for item in cloud.asked[role] if covers(statement, *item)]
            unused = {
                pattern
                for pattern in statement["Resource"]
                if not any(
                    fnmatch.fnmatchcase(f"arn:aws:s3:::{place}", pattern) for _, place in used
                )
            }
            if statement["Sid"] not in FOR_OTHER_DAYS:
                assert not unused - MAY_BE_UNUSED, f"{role} {statement['Sid']}"


MAY_BE_UNUSED = {
    "arn:aws:s3:::results/runs/*/manifest.r*.json",  # a retry that improved something
}


def check_encrypted() -> None:
    """The replica was told only where the run is; how to write it, it read there."""
    with disable_iam_authentication():
        client = make_client()
        found = client.list_objects_v2(Bucket="results")["Contents"]
        assert {item["Key"].split("/")[2] for item in found} >= {"commits", "_leases", "_attempts"}
        for item in found:
            info = client.head_object(Bucket="results", Key=item["Key"])
            assert info.get("ServerSideEncryption") == "AES256", item["Key"]


def leave_garbage(uri: str) -> None:
    """An attempt at a committed shard that was too late: its claim, its part, an unfinished upload."""
    store = open_store(uri)
    claim = json.loads(store.get(keys.attempt(0, 1, "attempt.json")))
    for number in (7, 8):
        late = json.dumps({**claim, "attempt": number}).encode()
        store.put(keys.attempt(0, number, "attempt.json"), late)
        store.put(keys.attempt(0, number, "completions.parquet"), b"x")


def hide_part(cloud: Cloud, uri: str) -> None:
    """What a worker leaves that dies between commit and reveal; the planner completes it."""
    for name in (keys.completions(0), keys.metrics(0)):
        with disable_iam_authentication():
            open_store(uri).delete(name)
    cloud.become("planner")
    store = open_store(uri)
    reveal_all(store, current_commits(store, digest(store.get(keys.PLAN))))
    assert store.head(keys.completions(0)).size > 0


RUN = "runs/night-0123456789"
DENIED = {
    "planner": [
        ("put_object", "results", f"{RUN}/commits/00000.json"),
        ("put_object", "results", f"{RUN}/_attempts/00000/001/completions.parquet"),
        ("put_object", "results", "elsewhere/run.json"),
        ("put_object", "prompts", "night/in.jsonl"),
        ("put_object", "models", "small/config.json"),
        ("delete_object", "results", f"{RUN}/completions/part-00000.parquet"),
        ("delete_object", "results", f"{RUN}/commits/00000.json"),
        ("get_object", "prompts", "morning/in.jsonl"),
        ("get_object", "results", "elsewhere/run.json"),
    ],
    "worker": [
        ("put_object", "results", f"{RUN}/run.json"),
        ("put_object", "results", f"{RUN}/plan.json"),
        ("put_object", "results", f"{RUN}/plan.parquet"),
        ("put_object", "results", f"{RUN}/manifest.json"),
        ("put_object", "results", "elsewhere/commits/00000.json"),
        ("put_object", "prompts", "night/in.jsonl"),
        ("put_object", "models", "small/config.json"),
        ("delete_object", "results", f"{RUN}/_attempts/00000/001/completions.parquet"),
        ("delete_object", "results", f"{RUN}/completions/part-00000.parquet"),
        ("delete_object", "results", f"{RUN}/commits/00000.json"),
        ("get_object", "models", "other/model.safetensors"),
    ],
    "collector": [
        ("put_object", "results", f"{RUN}/commits/00000.json"),
        ("put_object", "results", f"{RUN}/_attempts/00000/001/completions.parquet"),
        ("delete_object", "results", f"{RUN}/completions/part-00000.parquet"),
        ("delete_object", "results", f"{RUN}/commits/00000.json"),
        ("delete_object", "results", f"{RUN}/manifest.json"),
        ("get_object", "results", f"{RUN}/completions/part-00000.parquet"),
        ("get_object", "results", f"{RUN}/_attempts/00000/001/completions.parquet"),
        ("get_object", "prompts", "night/in.jsonl"),
    ],
}


def test_what_is_not_a_role_s_is_denied(cloud: Cloud) -> None:
    for role in ROLES:
        cloud.become(role)
        client: Any = make_client()
        for method, bucket, key in DENIED[role]:
            body = {"Body": b"x"} if method == "put_object" else {}
            with pytest.raises(ClientError, match="AccessDenied"):
                getattr(client, method)(Bucket=bucket, Key=key, **body)
    for bucket in ("prompts", "models"):  # as the collector
        with pytest.raises(ClientError, match="AccessDenied"):
            client.list_objects_v2(Bucket=bucket)


def test_a_denial_is_one_line_that_says_where_to_look(cloud: Cloud) -> None:
    cloud.become("worker")
    with pytest.raises(AccessDenied, match="check the credentials and the bucket's policy"):
        open_store(f"s3://results/{RUN}").put(keys.PLAN, b"{}")


def test_what_other_days_need_is_allowed(cloud: Cloud) -> None:
    cloud.become("planner")
    open_store(f"s3://results/{RUN}").put(keys.CANCEL, b"")
    for role, key in (("planner", "_inputs/00000-a.parquet"), ("worker", "_attempts/00000/001/x")):
        cloud.become(role)
        client = make_client()
        place = {"Bucket": "results", "Key": f"{RUN}/{key}"}
        begun = client.create_multipart_upload(**place)
        client.abort_multipart_upload(**place, UploadId=begun["UploadId"])


@pytest.mark.parametrize(
    ("role", "places"),
    [
        ("planner", ["run.json", "plan.json", "manifest.json", "manifest.r*.json"]),
        ("worker", ["commits/*"]),
    ],
)
def test_what_is_written_once_is_denied_without_the_condition(role: str, places: list[str]) -> None:
    (found,) = [s for s in policy(role)["Statement"] if "Condition" in s]
    assert (found["Effect"], found["Action"]) == ("Deny", "s3:PutObject")
    assert found["Condition"] == {"Null": {"s3:if-none-match": "true"}}
    assert found["Resource"] == [f"arn:aws:s3:::results/runs/*/{place}" for place in places]
