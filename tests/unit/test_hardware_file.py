"""The hardware file names GPU types; mistakes in it are named, and it comes with the wheel."""

import tomllib
from pathlib import Path

import pytest

from inference.errors import EngineConfigError
from inference.hardware import gpu_type, match_gpu
from tasks.hardware import default_hardware_path, load_hardware

ROOT = Path(__file__).parents[2]
ENTRY = {"memory_gb": 80, "bandwidth_gb_s": 2000, "tflops": {"bfloat16": 300}}


def test_the_file_lists_every_gpu_type_and_leaves_prices_to_the_user():
    gpus = load_hardware()
    assert [gpu.name for gpu in gpus] == [
        "T4", "L4", "A10", "L40S", "A100-40", "A100-80", "H100-PCIE", "H100-NVL", "H100", "H200", "B200", "MI300X",
    ]  # fmt: skip
    assert all(gpu.price_per_hour is None for gpu in gpus)


def test_the_wheel_carries_the_file_where_the_loader_looks():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]
    assert wheel["force-include"] == {"configs/hardware.yaml": "tasks/hardware.yaml"}
    assert default_hardware_path() == ROOT / "configs" / "hardware.yaml"


def test_numbers_become_bytes_and_flops():
    gpu = gpu_type("X", ENTRY | {"price_per_hour": 2.5})
    assert gpu.memory_bytes == 80e9
    assert gpu.bandwidth == 2e12
    assert gpu.flops == {"bfloat16": 3e14}
    assert gpu.price_per_hour == 2.5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"memory_gib": 80}, "unknown key 'memory_gib'; did you mean memory_gb"),
        ({"memory_gb": 0}, "memory_gb is 0"),
        ({"price_per_hour": "2 dollars"}, "price_per_hour is '2 dollars'"),
        ({"tflops": {}}, "tflops must name"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(change, named):
    with pytest.raises(EngineConfigError, match=named):
        gpu_type("X", ENTRY | change)


def test_a_missing_number_is_named():
    with pytest.raises(EngineConfigError, match="X: bandwidth_gb_s missing"):
        gpu_type("X", {"memory_gb": 80, "tflops": {"bfloat16": 1}})


def test_a_file_that_is_no_table_of_gpus_is_refused_with_its_path(tmp_path):
    path = tmp_path / "mine.yaml"
    with pytest.raises(EngineConfigError, match=r"mine\.yaml: No such file"):
        load_hardware(path)
    path.write_text("- H100\n")
    with pytest.raises(EngineConfigError, match=r"mine\.yaml: must map"):
        load_hardware(path)
    path.write_text("H100: {memory_gb: [\n")
    with pytest.raises(EngineConfigError, match=r"mine\.yaml: not valid YAML"):
        load_hardware(path)


@pytest.mark.parametrize(
    ("device", "memory_gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80"),
        ("NVIDIA L40S", 44.4, "L40S"),
        ("NVIDIA L4", 22.1, "L4"),
        ("NVIDIA A10", 22.1, "A10"),
        ("NVIDIA A10G", 22.1, "A10"),
        ("Tesla T4", 14.6, "T4"),
        ("AMD Instinct MI300X", 191.7, "MI300X"),
        ("NVIDIA H100 PCIe", 79.1, "H100-PCIE"),
        ("NVIDIA H100 NVL", 93.1, "H100-NVL"),
    ],
)
def test_a_device_is_found_by_what_the_driver_calls_it(device, memory_gib, name):
    found = match_gpu(device, memory_gib * 2**30, load_hardware())
    assert found is not None
    assert found.name == name


def test_an_h100_for_pcie_has_the_data_sheet_s_numbers_of_its_own():
    known = {gpu.name: gpu for gpu in load_hardware()}
    pcie, sxm = known["H100-PCIE"], known["H100"]
    assert (pcie.bandwidth, pcie.flops["bfloat16"], pcie.link) == (2.0e12, 756e12, "pcie")
    assert pcie.bandwidth < sxm.bandwidth
    assert pcie.link_bandwidth < sxm.link_bandwidth


def test_a_file_that_knows_only_the_plain_type_takes_a_variant_for_it():
    known = [gpu for gpu in load_hardware() if gpu.name == "H100"]
    found = match_gpu("NVIDIA H100 PCIe", 79.1 * 2**30, known)
    assert found is not None
    assert found.name == "H100"


def test_an_unknown_device_is_not_taken_for_another():
    assert match_gpu("NVIDIA GeForce RTX 4090", 24 * 2**30, load_hardware()) is None
    assert match_gpu("NVIDIA L40", 44.4 * 2**30, load_hardware()) is None
    assert match_gpu("NVIDIA H100 PCIe MIG 1g.10gb", 10 * 2**30, load_hardware()) is None
