import dataclasses
import json
from pathlib import Path

import pytest

from inference.errors import ModelError
from inference.weights import check_model_folder, content_id_of
from storage.errors import BadInput
from storage.model_caches import evict, list_staged
from storage.sizes import parse_bytes
from storage.stage_report import StageReport, wire_gb_per_s
from tasks.job import InputConfig, ModelConfig, OutputConfig, RunConfig
from tasks.job_machine import HardwareConfig
from tasks.stage import (
    as_json,
    describe,
    describe_cold_start,
    describe_entries,
    describe_evictions,
    find_for,
    meets_demand,
    stage,
    stage_for,
)
from tests.model_files import write_model

REPORT = StageReport(
    source="s3://b/m/",
    content_id="c" * 32,
    path="/nvme/n/models/c",
    outcome="staged",
    reason="weights 3.2 GB + 1.1 GB spare <= 81.8 GB free on nvme /nvme/n",
    disk="nvme",
    num_files=8,
    num_bytes=3_200_000_000,
    bytes_moved=3_000_000_000,
    bytes_resumed=200_000_000,
    huge_bytes=2_500_000_000,
    seconds=2.5,
    cpu_s=1.5,
    phases={"transfer": 2.0, "list": 0.1, "publish": 0.05, "wait": 0.0},
    thread_s={"read": 6.0, "checksum": 1.0, "write": 3.0},
    num_retries=2,
    wire_gb_per_s=3.125,
    disk_write_gb_per_s=2.0,
    disk_read_gb_per_s=3.0,
    verified_by={"the store": 7, "": 1},
    skipped=["a.py"],
    evicted=["d" * 32],
)


def test_the_paragraph_says_how_fast_how_sure_and_where_the_time_went() -> None:
    text = describe(REPORT)
    assert "\n" not in text
    for part in (
        "8 files, 3.20 GB, staged at /nvme/n/models/c (nvme) in 2.50 s: weights 3.2 GB",
        "Moved 3.00 GB in 2.00 s = 1.50 GB/s",
        "48% of the wire (3.12 GB/s)",
        "75% of what the disk can write (2.00 GB/s)",
        "the 1 GB/s that NVMe must give is met",
        "0.20 GB were there from an earlier try",
        "2.50 GB lie on huge pages.",
        "moving bytes 2.00 s",
        "60% waiting for the source, 10% checksums, 30% writing",
        "0.50 CPU s/GB, 2 ranges asked for again",
        "Verified: 7 by the store; 1 files have no recorded checksum",
        "1 older models were evicted",
        "Not staged: a.py.",
    ):
        assert part in text


def test_a_slow_stage_is_called_slow_and_a_tiny_one_is_not_judged() -> None:
    slow = dataclasses.replace(REPORT, phases={"transfer": 10.0})
    assert meets_demand(slow) is False
    assert "below the 1 GB/s" in describe(slow)
    tiny = dataclasses.replace(REPORT, bytes_moved=1000)
    assert meets_demand(tiny) is None
    assert "too little to judge" in describe(tiny)


def test_a_hit_is_said_without_speeds() -> None:
    hit = dataclasses.replace(REPORT, outcome="hit", bytes_moved=0, reason="it was staged already")
    assert "GB/s" not in describe(hit)
    assert as_json(hit)["meets_demand"] is None


def test_a_cold_start_says_how_long_it_waited_and_what_passed_meanwhile() -> None:
    cold = dataclasses.replace(REPORT, seconds=19.4)
    assert describe_cold_start(cold, before_s=0.7, ready_s=19.7, waited_s=6.9) == (
        "engine ready 19.7 s after config and tokenizer were here, 6.9 s of it waiting for weights; of the "
        "19.4 s that staging took, 11.8 s passed while the engine started and loaded"
    )


def test_the_json_is_strict_and_has_the_verdict() -> None:
    value = json.loads(json.dumps(as_json(REPORT), allow_nan=False))
    assert value["gb_per_s"] == 1.5
    assert value["meets_demand"] is True


def test_a_staged_model_keeps_the_name_the_engine_gives_it(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", num_weight_files=2)
    before = check_model_folder(model)
    with stage(str(model), stage_to=str(tmp_path / "cache")) as staged:
        after = check_model_folder(staged.path)
        assert after.content_id == before.content_id
        assert content_id_of(staged.path, after.weight_files) == before.content_id
        assert describe(staged.report)


def test_a_job_finds_a_gguf_file_only_in_its_own_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf, cache = tmp_path / "m.gguf", str(tmp_path / "cache")
    gguf.write_bytes(b"GGUF")

    def convert(path: Path, folder: Path, dtype: str) -> Path:
        return write_model(folder, num_weight_files=1)

    monkeypatch.setattr("inference.gguf.convert_gguf", convert)
    stage(str(gguf), stage_to=cache, dtype="bfloat16").close()
    bfloat16 = RunConfig(
        model=ModelConfig(source=str(gguf), dtype="bfloat16"),
        input=InputConfig(uri="in"),
        output=OutputConfig(uri="out"),
        hardware=HardwareConfig(stage_to=cache),
    )
    float32 = dataclasses.replace(bfloat16, model=ModelConfig(source=str(gguf), dtype="float32"))
    assert find_for(float32) is None
    with stage_for(float32) as staged:
        assert staged.report.outcome == "staged"
    for job in (bfloat16, float32):
        found = find_for(job)
        assert found is not None
        found.close()


def test_staged_models_are_listed_and_evicted_in_words(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    assert describe_entries(list_staged([root])) == "no staged models on this machine"
    model = write_model(tmp_path / "m")
    with stage(str(model), stage_to=str(root)) as staged:
        text = describe_entries(list_staged([root]))
        assert staged.content_id[:12] in text
        assert str(model) in text
        assert text.endswith("in use")
        assert "kept, a process is using it" in describe_evictions(evict(str(model), roots=[root]))
    assert "evicted" in describe_evictions(evict(str(model), roots=[root]))
    assert describe_evictions([]) == "nothing to evict"


def test_a_job_s_budget_is_kept_when_its_model_is_staged(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    job = RunConfig(
        model=ModelConfig(source=str(write_model(tmp_path / "new", weight_bytes=100_000))),
        input=InputConfig(uri="in"),
        output=OutputConfig(uri="out"),
        hardware=HardwareConfig(stage_to=str(cache), stage_budget="300 kB"),
    )
    stage(str(write_model(tmp_path / "old", weight_bytes=100_000)), stage_to=str(cache)).close()
    with stage_for(job) as staged:
        assert len(staged.report.evicted) == 1
    assert [Path(entry.source).name for entry in list_staged([cache])] == ["new"]


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("200GB", 200e9), ("1.5 TiB", 1.5 * 2**40), ("64g", 64e9), (7, 7), ("512 B", 512)],
)
def test_a_size_is_read_as_people_write_it(text: str | int, num_bytes: float) -> None:
    assert parse_bytes(text, name="x") == num_bytes


@pytest.mark.parametrize("text", ["", "many", "0", "-3GB", "3XB", "1e9", "٣"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadInput, match=r"--budget: .* is no size above 0; write it as 200GB"):
        parse_bytes(text, name="--budget")


def test_a_package_without_a_gguf_file_is_refused() -> None:
    with pytest.raises(ModelError, match="is not installed"):
        stage("pkg:no_such_package_at_all")


def test_the_fastest_link_that_is_up_is_the_wire(tmp_path: Path) -> None:
    assert wire_gb_per_s(str(tmp_path / "none")) is None
    for link, speed in (("eth0", "25000\n"), ("eth1", "100000\n"), ("down", "-1\n")):
        (tmp_path / link).mkdir()
        (tmp_path / link / "speed").write_text(speed)
    (tmp_path / "lo").mkdir()
    assert wire_gb_per_s(str(tmp_path)) == 12.5
