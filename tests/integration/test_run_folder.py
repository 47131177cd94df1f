"""Commands that take a run folder reach it as the run's own record says."""

import errno
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli import main
from storage.object_store import StorageConfig, open_store
from tasks.run_folder import open_run, recorded_storage
from tests.pipeline import Nightjar
from tests.seaweed import ACCESS_KEY, READER_KEY, READER_SECRET, SECRET_KEY, Seaweed


@pytest.fixture
def nightjar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Nightjar:
    return Nightjar(tmp_path, capsys)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    table = pa.table({"id": [0, 1, 2, 3], "prompt": ["one", None, "three", "four"]})
    pq.write_table(table, tmp_path / "prompts.parquet")
    return tmp_path / "prompts.parquet"


@pytest.fixture
def two_profiles(seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ambient profile may only read; `night` may write."""
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id = {READER_KEY}\naws_secret_access_key = {READER_SECRET}\n"
        f"[night]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


@pytest.mark.usefixtures("two_profiles")
def test_a_run_is_redone_drained_and_tidied_with_the_profile_it_was_made_with(
    nightjar: Nightjar, seaweed: Seaweed, prompts: Path
) -> None:
    endpoint = ("--endpoint-url", seaweed.endpoint_url)
    settings = {
        "engine__backend": "dummy",
        "output__uri": f"{seaweed.uri}/out",
        "shards__max_rows": 2,
        "storage__endpoint_url": seaweed.endpoint_url,
    }
    denied = nightjar.run("none", prompts, **settings)
    assert denied.code == 2
    assert "check the credentials" in denied.err
    done = nightjar.run("none", prompts, **settings, storage__profile="night")
    assert done.code == 0, done.err
    run = done.document["run"]
    writer = open_store(run, StorageConfig(endpoint_url=seaweed.endpoint_url, profile="night"))
    for command in ("drain", "retry"):
        writer.delete("commits/00001.json")
        writer.delete("manifest.json")
        by_reader = nightjar.call(command, run, *endpoint, "--profile", "default", "--json")
        assert by_reader.code in (2, 3), "what is given goes over what is recorded"
        found = nightjar.call(command, run, *endpoint, "--json")
        assert found.code == 0, (command, found.err)
        assert writer.head("commits/00001.json")
    assert writer.head("manifest.json")
    writer.put("_attempts/00000/009/completions.parquet", b"what a killed attempt left")
    for command in ("gc", "report", "cancel", "verify"):
        found = nightjar.call(command, run, *endpoint, "--json")
        assert found.code == 0, (command, found.err)
    assert writer.head("_cancel")


@pytest.mark.usefixtures("two_profiles")
def test_a_recorded_profile_that_is_not_known_here_is_named(
    nightjar: Nightjar, seaweed: Seaweed, prompts: Path, tmp_path: Path
) -> None:
    done = nightjar.run(
        "none",
        prompts,
        engine__backend="dummy",
        output__uri=f"{seaweed.uri}/out",
        storage__endpoint_url=seaweed.endpoint_url,
        storage__profile="night",
    )
    text = (tmp_path / "credentials").read_text()
    (tmp_path / "credentials").write_text(text.replace("[night]", "[evening]"))
    endpoint = ("--endpoint-url", seaweed.endpoint_url)
    found = nightjar.call("retry", done.document["run"], *endpoint)
    assert found.code == 2
    assert "profile (night) could not be found" in found.err
    other = nightjar.call("retry", done.document["run"], *endpoint, "--profile", "evening")
    assert other.code == 0, other.err


def test_a_run_in_a_folder_without_hard_links_is_redone_as_one_writer(
    nightjar: Nightjar, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    settings = {"engine__backend": "dummy", "shards__max_rows": 2}
    assert nightjar.run("none", prompts, **settings).code == 2
    done = nightjar.run("none", prompts, **settings, storage__allow_single_writer=True)
    assert done.code == 0, done.err
    assert main(["retry", str(done.run), "--json"]) == 0
    assert main(["drain", str(done.run), "--json"]) == 0
    assert main(["verify", str(done.run), "--json"]) == 0


def test_what_is_given_goes_over_what_is_recorded(nightjar: Nightjar, prompts: Path) -> None:
    done = nightjar.run(
        "none",
        prompts,
        engine__backend="dummy",
        storage__endpoint_url="http://127.0.0.1:1",
        storage__region="eu-west-1",
    )
    record = open_run(str(done.run)).record
    assert recorded_storage(record).endpoint_url == "http://127.0.0.1:1"
    given = StorageConfig(endpoint_url="http://127.0.0.1:2", profile="mine")
    assert recorded_storage(record, given) == StorageConfig(
        endpoint_url="http://127.0.0.1:2", region="eu-west-1", profile="mine"
    )
