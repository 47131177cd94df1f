"""What SECURITY.md says of files, names and images."""

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import BadInput
from storage.inputs import InputFiles
from storage.object_store import StorageConfig
from storage.staging import stage_model
from tasks.scratch import scratch_folder
from tests.model_files import write_model
from tests.moto_in_turn import moto_in_turn

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"


@pytest.fixture
def open_umask() -> Iterator[None]:
    """A process that would let everybody read whatever it writes."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mode & 0o777 for path in root.rglob("*")}


@pytest.mark.usefixtures("open_umask")
def test_staged_weights_are_their_owner_s_alone(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    cache = tmp_path / "cache"
    stage_model(str(model), config=StorageConfig(), stage_to=str(cache)).close()
    found = modes(cache)
    assert any(name.endswith(".safetensors") for name in found)
    assert cache.stat().st_mode & 0o777 == 0o700
    for name, mode in found.items():
        expected = 0o700 if (cache / name).is_dir() else 0o600
        assert mode == expected, f"{name}: {mode:o}"


@pytest.mark.usefixtures("open_umask")
def test_rows_on_their_way_lie_in_a_folder_of_their_owner_s(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "work") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


@pytest.mark.parametrize("name", ["../../secret.parquet", "/etc/secret.parquet", "a\\b.parquet", 7])
def test_a_dataset_cannot_name_files_outside_its_folder(tmp_path: Path, name: object) -> None:
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "secret.parquet")
    folder = tmp_path / "data" / "set"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(BadInput, match=r"state\.json"):
        list(InputFiles(tmp_path / "work", StorageConfig()).expand(str(folder)))


@pytest.mark.parametrize("key", ["in/a\\b.parquet", "in/" + "x" * 300 + ".parquet"])
def test_an_object_whose_name_could_lead_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    body = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["x"]}), body)
    with moto_in_turn():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="inputs")
        for name in (key, "in/../../escape.parquet", "in/good.parquet"):
            client.put_object(Bucket="inputs", Key=name, Body=body.getvalue())
        files = InputFiles(tmp_path, StorageConfig())
        for uri in ("s3://inputs/in/", f"s3://inputs/{key}", "s3://inputs/in/../x.parquet"):
            with pytest.raises(BadInput, match="unsafe object key"):
                list(files.expand(uri))
        client.delete_object(Bucket="inputs", Key=key)
        (found,) = files.expand("s3://inputs/in/")
        path = files.fetch(found.uri, found.etag)
    assert path.name == "good.parquet"
    assert path.resolve().is_relative_to(tmp_path.resolve())


def test_the_image_and_its_pods_run_as_nobody_special() -> None:
    lines = (DEPLOYMENTS / "Dockerfile").read_text().splitlines()
    last_stage = max(index for index, line in enumerate(lines) if line.startswith("FROM"))
    users = [line for line in lines[last_stage:] if line.startswith("USER")]
    assert users == ["USER 10001:10001"]
    after = lines[lines.index(users[0]) :]
    assert not [line for line in after if line.startswith(("RUN", "COPY", "ADD"))]
    text = (DEPLOYMENTS / "kubernetes.json").read_text()
    assert re.search(r'"runAsNonRoot": true,\s+"runAsUser": 10001', text)
    assert '"privileged": true' not in text
    assert '"user": "10001"' in (DEPLOYMENTS / "ecs.json").read_text()
    assert "HF_HUB_OFFLINE=1" in "\n".join(lines)


# The first version without a hole that was published and that untrusted input could reach.
FLOORS = {
    "pyarrow": (23, 0, 1),  # CVE-2026-25087: use after free in IPC files
    "jinja2": (3, 1, 6),  # CVE-2025-27516: a way out of the sandbox
    "torch": (2, 10),  # CVE-2026-24747: code run by weights-only loading
}


@pytest.mark.parametrize("name", FLOORS)
def test_versions_with_known_holes_cannot_be_installed(name: str) -> None:
    text = (DEPLOYMENTS.parent / "pyproject.toml").read_text()
    found = re.search(rf'"{name}>=([0-9.]+)', text)
    assert found is not None
    assert tuple(map(int, found[1].split("."))) >= FLOORS[name]
