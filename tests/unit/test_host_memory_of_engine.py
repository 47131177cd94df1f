"""What is kept free for the engine when weights are staged to memory follows from the job, and is said."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from storage.destinations import CACHE_VARIABLE, HostMemory
from storage.model_caches import evict
from tasks.engine_memory import engine_memory
from tasks.job import InputConfig, ModelConfig, OutputConfig, RunConfig
from tasks.job_machine import EngineKnobs
from tasks.stage import stage_for
from tests.model_files import write_model

GB = 10**9
H100 = 80 * GB
WEIGHTS = 100 * GB


def job_of(source: str = "m", *, dtype: Any = "auto", **knobs: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(source=source, dtype=dtype),
        input=InputConfig(uri="in"),
        output=OutputConfig(uri="out"),
        engine=EngineKnobs(**knobs),
    )


@pytest.mark.parametrize(
    ("knobs", "gpus", "host_weights"),
    [
        ({}, [], WEIGHTS),
        ({"dtype": "float32"}, [], 2 * WEIGHTS),
        ({"backend": "zero", "offload": "nvme"}, [], 0),
        ({}, [H100, H100], 0),
        ({}, [H100], WEIGHTS),
        ({"backend": "paged"}, [H100], 0),
        ({"backend": "zero"}, [H100, H100], WEIGHTS),
        ({"backend": "zero", "offload": "cpu"}, [H100], WEIGHTS),
        ({"backend": "zero", "offload": "nvme"}, [H100], 0),
        ({"backend": "transformers"}, [H100], WEIGHTS - 68 * GB),
        ({"backend": "transformers", "offload": "none"}, [H100], 0),
    ],
)
def test_weights_count_once_more_where_the_engine_holds_them_in_host_memory(
    knobs: dict[str, Any], gpus: list[int], host_weights: int
) -> None:
    need = engine_memory(job_of(**knobs), WEIGHTS, gpus)
    assert need.num_bytes == (4 << 30) * (1 + len(gpus)) + host_weights
    assert ("weights in host memory" in need.parts) == bool(host_weights)
    assert ("pinned buffers" in need.parts) == bool(gpus)


def test_gpus_are_counted_without_importing_torch_and_as_many_as_the_replica_has() -> None:
    program = """
import sys
from tests.unit.test_host_memory_of_engine import job_of
import tasks.engine_memory
tasks.engine_memory.gpu_bytes = lambda: [80 * 10**9] * 8
print(tasks.engine_memory.engine_memory(job_of(tensor_parallel_size=2), 10**9).parts)
assert "torch" not in sys.modules
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pinned buffers of 2 GPUs" in said.stdout, said.stderr


def test_a_job_whose_engine_needs_the_memory_has_its_weights_on_disk_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m", weight_bytes=60_000_000)
    monkeypatch.setattr("tasks.engine_memory.gpu_bytes", list)
    monkeypatch.setattr("storage.in_place.disk_kind", lambda path: "network")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        monkeypatch.setenv(CACHE_VARIABLE, f"{shm}:{tmp_path}/cache")
        memory = (4 << 30) + 200_000_000
        monkeypatch.setattr("storage.model_caches.host_memory", lambda: HostMemory(memory, "test"))
        with stage_for(job_of(str(model), backend="zero", offload="nvme")) as staged:
            assert staged.path.is_relative_to(shm)
            assert "(4.3 GB for the process and its rows)" in staged.report.reason
        evict(staged.content_id, roots=[Path(shm)])
        with stage_for(job_of(str(model))) as staged:
            assert staged.path.is_relative_to(tmp_path / "cache")
            assert (
                "engine 4.4 GB (4.3 GB for the process and its rows, 0.1 GB for weights in host"
                in (staged.report.reason)
            )
