"""A tier becomes a deployment and job variables that the provider's template knows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from inference.tier import Tier
from tasks.hardware import load_hardware
from tasks.job_variables import ProvisionError, check_job_variables, unused_variables
from tasks.provision import Placement, launch_of, unsized_launch_of

GPUS = {gpu.name: gpu for gpu in load_hardware()}
TEMPLATES = {
    provider: json.loads(
        (Path(__file__).parents[2] / "deployments" / f"{provider}.json").read_text()
    )
    for provider in ("kubernetes", "ecs")
}
GIB = 2**30


def tier(gpu="H100", tp=1, replicas=1, offload="none", num_gpus=None):
    return Tier(
        gpu=gpu,
        num_gpus=num_gpus or tp * replicas,
        memory_bytes=(num_gpus or tp * replicas) * 80e9,
        tensor_parallel_size=tp,
        replicas=replicas,
        quantization="none",
        dtype="bfloat16",
        kv_cache_dtype="auto",
        backend="paged" if offload == "none" else "zero",
        offload=offload,
        num_hosts=1,
        weight_bytes_per_gpu=16 * 10**9,
        kv_bytes_per_gpu=10 * 10**9,
        kv_tokens=100_000,
        num_running=256,
        completion_tokens_per_s=1000.0,
        total_tokens_per_s=2000.0,
        seconds=3600.0,
        usd_per_hour=None,
        usd=None,
        usd_per_million_tokens=None,
    )


def launch(a_tier, provider, *, weights=16 * 10**9, **kwargs):
    return launch_of(
        a_tier, GPUS[a_tier.gpu], provider=provider, weight_file_bytes=weights, **kwargs
    )


def test_a_kubernetes_replica_holds_its_weights_in_shared_memory_that_its_limit_counts():
    found = launch(tier(tp=2, replicas=4), "kubernetes", weights=65 * 10**9)
    variables = found.job_variables
    assert found.deployment == "generate-shards/kubernetes"
    assert variables["gpu_count"] == 2
    assert variables["shm_size"] == "70Gi"
    assert variables["memory_limit"] == variables["memory_request"] == "94Gi"
    assert variables["node_selector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert (variables["num_hosts"], variables["completion_mode"]) == (1, "NonIndexed")


def test_weights_too_large_for_a_hosts_memory_go_to_nvme():
    variables = launch(tier("T4"), "kubernetes", weights=40 * 10**9).job_variables
    assert variables["shm_size"] == "8Gi"
    assert variables["weights_empty_dir"] == {"sizeLimit": "39Gi"}
    assert variables["env"]["NIGHTJAR_CACHE"] == "/weights"


def test_a_folder_on_the_node_replaces_the_pods_own_volume():
    placement = Placement(weights_host_path="/mnt/nvme/nightjar")
    variables = launch(tier(), "kubernetes", placement=placement, stage_to="nvme").job_variables
    assert variables["weights_host_path"]["path"] == "/mnt/nvme/nightjar"
    assert "weights_empty_dir" not in variables


def test_offloaded_weights_are_counted_into_memory_and_not_staged_into_it_again():
    variables = launch(
        tier(offload="cpu", num_gpus=1), "kubernetes", weights=65 * 10**9
    ).job_variables
    assert variables["shm_size"] == "8Gi"
    assert variables["memory_limit"] == "89Gi"


def test_a_replica_over_two_hosts_is_an_indexed_job():
    variables = launch(tier(tp=16), "kubernetes").job_variables
    assert variables["gpu_count"] == 8
    assert variables["num_hosts"] == 2
    assert variables["completion_mode"] == "Indexed"
    assert variables["env"]["NIGHTJAR_NUM_HOSTS"] == "2"
    assert variables["env"]["NIGHTJAR_GPUS_PER_HOST"] == "8"


@pytest.mark.parametrize("provider", ["process", "ecs", "command"])
def test_a_replica_over_two_hosts_is_refused_where_only_one_can_be_had(provider):
    with pytest.raises(ProvisionError, match="spans 2 hosts"):
        launch(tier(tp=16), provider)


def test_ecs_gets_its_quantities_as_it_wants_them():
    variables = launch(tier("L4", tp=4), "ecs").job_variables
    assert variables["gpu_count"] == "4"
    assert variables["cpu"] == 16 * 1024
    assert variables["shm_mib"] == 8 * 1024 + 15564
    assert variables["memory"] == 32 * 1024 + variables["shm_mib"]
    assert (
        variables["placement_constraints"][0]["expression"] == "attribute:ecs.instance-type =~ g6.*"
    )


def test_a_launcher_is_filled_in_with_the_tiers_numbers():
    placement = Placement(launcher="srun --nodes={hosts} --gres=gpu:{gpus} --mem={memory_mib}M")
    variables = launch(tier(tp=16), "command", placement=placement).job_variables
    assert variables["launcher"].startswith("srun --nodes=2 --gres=gpu:8 --mem=")
    assert variables["gpu_count"] == 8


def test_a_launcher_that_asks_for_an_unknown_number_is_refused():
    with pytest.raises(ProvisionError, match=r"it may name \{gpus\}, \{hosts\}"):
        launch(tier(), "command", placement=Placement(launcher="srun --gres=gpu:{gpu}"))


def test_a_gpu_without_a_known_node_label_is_refused_until_one_is_given():
    with pytest.raises(ProvisionError, match="no node label is known for MI300X"):
        launch(tier("MI300X"), "kubernetes")
    placement = Placement(node_selector={"gpu": "mi300x"})
    assert launch(tier("MI300X"), "kubernetes", placement=placement).job_variables[
        "node_selector"
    ] == {"gpu": "mi300x"}


def test_what_the_platform_fixes_is_added():
    placement = Placement(
        image="registry.example/nightjar:3",
        env={"AWS_REGION": "eu-west-1"},
        job_variables={"namespace": "batch"},
    )
    variables = launch(tier(), "kubernetes", placement=placement).job_variables
    assert variables["image"] == "registry.example/nightjar:3"
    assert variables["namespace"] == "batch"
    assert variables["env"]["AWS_REGION"] == "eu-west-1"
    assert variables["env"]["NIGHTJAR_NUM_HOSTS"] == "1"


@pytest.mark.parametrize("provider", ["kubernetes", "ecs"])
@pytest.mark.parametrize(
    "a_tier",
    [tier("L4"), tier("H100", tp=8, replicas=2), tier("H100", offload="cpu", num_gpus=4),
     tier("A100-80", offload="nvme", num_gpus=2)],
    ids=["one card", "eight cards", "offload to memory", "offload to NVMe"],
)  # fmt: skip
def test_every_tiers_variables_are_known_to_the_template(provider, a_tier):
    check_job_variables(launch(a_tier, provider).job_variables, TEMPLATES[provider])


@pytest.mark.parametrize("provider", ["kubernetes", "ecs"])
def test_a_template_reads_every_variable_it_declares(provider):
    # `vpc_id` and the like are read by the worker from the configuration's own keys.
    assert unused_variables(TEMPLATES[provider]) == set()


def test_a_misspelt_variable_is_refused_with_the_nearest_one():
    with pytest.raises(ProvisionError, match=r"'gpu_cont' .* did you mean gpu_count"):
        check_job_variables({"gpu_cont": 8}, TEMPLATES["kubernetes"])


@pytest.mark.parametrize(
    ("provider", "value", "kind"), [("kubernetes", "4", "integer"), ("ecs", 4, "string"), ("kubernetes", True, "integer")]
)  # fmt: skip
def test_a_variable_of_another_type_is_refused(provider, value, kind):
    with pytest.raises(ProvisionError, match=f"takes {kind}"):
        check_job_variables({"gpu_count": value}, TEMPLATES[provider])


def test_null_is_taken_where_the_template_takes_it():
    check_job_variables({"weights_empty_dir": None}, TEMPLATES["kubernetes"])
    with pytest.raises(ProvisionError, match="shm_size is None"):
        check_job_variables({"shm_size": None}, TEMPLATES["kubernetes"])


def test_memory_grows_with_the_gpus_of_a_host_only():
    two = launch(tier(tp=2), "ecs").job_variables["memory"]
    many_replicas = launch(replace(tier(tp=2), replicas=8, num_gpus=16), "ecs").job_variables[
        "memory"
    ]
    four = launch(tier(tp=4), "ecs").job_variables["memory"]
    assert two == many_replicas
    assert four - two == 2 * 4 * 1024


def test_without_a_tier_the_owner_s_placement_still_holds():
    placement = Placement(
        image="registry/nightjar:3",
        node_selector={"pool": "cpu"},
        launcher="srun --gres=gpu:{gpus} --cpus-per-task={cpus}",
        env={"A": "placement", "B": "placement"},
        job_variables={"env": {"B": "variables"}},
    )
    env = {"A": "placement", "B": "variables"}
    found = {
        provider: unsized_launch_of(provider, placement).job_variables
        for provider in ("process", "kubernetes", "ecs", "command")
    }
    assert found == {
        "process": {"env": env},
        "kubernetes": {
            "env": env,
            "image": "registry/nightjar:3",
            "node_selector": {"pool": "cpu"},
        },
        "ecs": {"env": env, "image": "registry/nightjar:3"},
        "command": {"env": env, "launcher": "srun --gres=gpu:0 --cpus-per-task=4"},
    }


def test_environment_of_the_job_variables_goes_over_that_of_the_tier_key_by_key():
    placement = Placement(job_variables={"env": {"NCCL_DEBUG": "INFO"}})
    env = launch(tier(), "kubernetes", placement=placement).job_variables["env"]
    assert env["NCCL_DEBUG"] == "INFO"
    assert env["NIGHTJAR_NUM_HOSTS"] == "1"


def test_nodes_with_either_name_of_a_card_will_do():
    variables = launch(tier("A10"), "kubernetes").job_variables
    assert variables["node_selector"] == {}
    (term,) = variables["affinity"]["nodeAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [
        {
            "key": "nvidia.com/gpu.product",
            "operator": "In",
            "values": ["NVIDIA-A10", "NVIDIA-A10G"],
        }
    ]
    fixed = Placement(node_selector={"pool": "a10"})
    assert "affinity" not in launch(tier("A10"), "kubernetes", placement=fixed).job_variables
