"""A stager that trusts its resume journal: the planted bug, and the check that catches it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import StoreUnavailable
from storage.object_store import StorageConfig
from storage.partial_file import PartialFile
from storage.s3_client import RetryPolicy, make_client
from storage.staging import stage_model
from tests.faults.fault_proxy import FaultProxy, Rule
from tests.model_files import folder_bytes, write_model

_FAST = RetryPolicy(max_attempts=3, base_s=0.01)
_RANGE_BYTES = 16 << 20
_WEIGHTS = "model-00001-of-00001.safetensors"


def stages_damage(port: int, bucket: str, folder: Path) -> bool:
    """Stop a stager after one range, damage that range on disk, stage on; say whether damage got through."""
    model = write_model(folder / "model", num_weight_files=1, weight_bytes=_RANGE_BYTES + (1 << 20))
    direct = StorageConfig(endpoint_url=f"http://127.0.0.1:{port}", region="us-east-1")
    client = make_client(direct)
    for path in model.iterdir():
        client.put_object(
            Bucket=bucket,
            Key=f"journal/{path.name}",
            Body=path.read_bytes(),
            ChecksumAlgorithm="CRC64NVME",
        )
    client.close()
    source, cache = f"s3://{bucket}/journal/", folder / "cache"
    num_ranges = 0

    def refuse_the_second(line: str) -> Rule | None:
        nonlocal num_ranges
        if not line.startswith("GET") or _WEIGHTS not in line:
            return None
        num_ranges += 1
        return Rule("status", "") if num_ranges > 1 else None

    options = {"stage_to": str(cache), "retry": _FAST, "num_threads": 1}
    with FaultProxy(port, dice=refuse_the_second) as proxy:
        config = StorageConfig(endpoint_url=proxy.endpoint_url, region="us-east-1")
        try:
            stage_model(source, config=config, **options).close()  # type: ignore[arg-type]
        except StoreUnavailable:
            (partial,) = cache.rglob(f"{_WEIGHTS}.partial")
        else:
            raise AssertionError("the stager was not stopped")
        with partial.open("r+b") as file:
            file.seek(1 << 20)
            byte = file.read(1)
            file.seek(1 << 20)
            file.write(bytes([byte[0] ^ 1]))
        proxy.dice = None
        with stage_model(source, config=config, **options) as staged:  # type: ignore[arg-type]
            return folder_bytes(staged.path) != folder_bytes(model)


@contextmanager
def trusting_journal() -> Iterator[None]:
    """Plant the bug: what the journal notes is taken to be on the disk."""

    right = PartialFile.resume

    def resume(self: PartialFile) -> int:
        noted = self._noted()
        right(self)
        self._checksums.update(noted)
        return sum(end - start for start, end in map(self.span, noted))

    PartialFile.resume = resume  # type: ignore[method-assign]
    try:
        yield
    finally:
        PartialFile.resume = right  # type: ignore[method-assign]
