"""Credentials stay in the environment: looked for in everything a run writes, prints, logs and starts."""

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inference.backends.dummy import DummyBackend
from storage.object_store import open_store
from tasks import claims
from tasks.replica import Replica
from tests.feed_bench import Bench, make_job
from tests.pipeline import Finished, Nightjar
from tests.seaweed import SECRET_KEY, Seaweed

PLANTED = {
    "HF_TOKEN": "hf_sesame-1-e4b7",
    "HUGGING_FACE_HUB_TOKEN": "hf_sesame-2-e4b7",
    "PREFECT_API_KEY": "pnu_sesame-3-e4b7",
    "DATABASE_PASSWORD": "sesame-4-e4b7",
}
PROMPT = "sesame-prompt-e4b7"
SECRETS = [SECRET_KEY, *PLANTED.values()]


@pytest.fixture
def nightjar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Nightjar:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "in.parquet"
    pq.write_table(
        pa.table({"id": range(40), "prompt": [f"{PROMPT} {i}" for i in range(40)]}), path
    )
    return Nightjar(tmp_path, capsys)


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Every logger at its most talkative, as somebody who looks for a fault would set them."""
    caplog.set_level(logging.DEBUG)
    return caplog


def run(nightjar: Nightjar, seaweed: Seaweed, **settings: Any) -> Finished:
    return nightjar.run(
        "none",
        nightjar.folder / "in.parquet",
        engine__backend="dummy",
        output__uri=f"{seaweed.uri}/out",
        storage__endpoint_url=seaweed.endpoint_url,
        metrics__textfile_dir=str(nightjar.folder / "metrics"),
        **settings,
    )


def check(*texts: str | bytes, where: str = "") -> None:
    for text in texts:
        data = text if isinstance(text, bytes) else text.encode()
        for secret in SECRETS:
            assert secret.encode() not in data, where


def test_nothing_a_run_leaves_or_says_holds_a_secret(
    nightjar: Nightjar, seaweed: Seaweed, logs: pytest.LogCaptureFixture
) -> None:
    (nightjar.folder / "metrics").mkdir()
    done = run(nightjar, seaweed, shards__max_rows=10)
    assert done.code == 0, done.err
    check(done.out, done.err)
    place = ("--endpoint-url", seaweed.endpoint_url, "--json")
    for command in ("status", "verify", "report", "retry", "gc"):
        found = nightjar.call(command, done.document["run"], *place)
        assert found.code == 0, found.err
        check(found.out, found.err)
    bucket = open_store(seaweed.uri, seaweed.config)
    written = [info.key for info in bucket.list()]
    for kind in ("run.json", "commits/", "metrics/", "report.html", "manifest.json", "_leases/"):
        assert any(kind in key for key in written), kind
    for key in written:
        check(bucket.get(key), where=key)
    metrics = [path.read_bytes() for path in (nightjar.folder / "metrics").iterdir()]
    assert metrics
    assert PROMPT.encode() not in b"".join(metrics)
    check(*metrics, logs.text)
    assert PROMPT not in logs.text


def test_a_refused_credential_is_not_told(
    nightjar: Nightjar,
    seaweed: Seaweed,
    logs: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED["DATABASE_PASSWORD"])
    done = run(nightjar, seaweed)
    assert done.code == 2
    assert "check the credentials" in done.err
    check(done.out, done.err, logs.text)


@pytest.mark.parametrize(
    ("broken", "name", "code", "words"),
    [
        (Replica, "next_shard", 1, "something nobody thought of"),
        (DummyBackend, "step", 3, "RuntimeError at test_secrets.py"),
    ],
)
def test_a_crash_of_our_own_tells_neither_secrets_nor_prompts(
    nightjar: Nightjar,
    seaweed: Seaweed,
    logs: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    broken: type,
    name: str,
    code: int,
    words: str,
) -> None:
    def step(self: object) -> None:
        raise RuntimeError("something nobody thought of")

    monkeypatch.setattr(claims, "_BACKOFF_S", 0.01)
    monkeypatch.setattr(broken, name, step)
    done = run(nightjar, seaweed)
    assert done.code == code
    assert words in done.err
    check(done.out, done.err, logs.text)
    assert PROMPT not in done.out + done.err + logs.text
    bucket = open_store(seaweed.uri, seaweed.config)
    for info in bucket.list():
        check(bucket.get(info.key), where=info.key)


def test_the_child_that_reads_hostile_input_has_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**PLANTED, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"prompt": ["x"]}), path)
    bench, job = Bench(tmp_path), make_job(path)
    plan = bench.plan(job, "tiny-a")
    with bench.open(job, "tiny-a") as feed:
        next(feed.read(plan, 0, 1))
        child = feed._process._child
        assert child is not None
        environment = Path(f"/proc/{child.pid}/environ").read_bytes()
        check(environment, Path(f"/proc/{child.pid}/cmdline").read_bytes())
    assert b"PYTHONPATH=" in environment
    for name in (*PLANTED, "AWS_"):
        assert name.encode() not in environment
