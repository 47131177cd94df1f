"""The files in deployments/ render, for every kind of tier, into requests the platforms accept.

Rendering and snapshots need Prefect only. The strict schemas and the real workers' own checks need
the `provision-test` extra; without it those tests are skipped and say so.
"""

import copy
import dataclasses
import json
import os
import re
import shlex
import subprocess
import uuid
from functools import cache
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas.objects import Flow, FlowRun
from prefect.utilities.templating import apply_values

from flows.cli import build_parser
from flows.config import load_job
from flows.inbox_jobs import InboxJobs
from flows.served import check_paths
from inference.model_config import model_shape
from inference.tier import Options
from inference.tiers import choose_tier
from inference.workload import Workload
from tasks.gpu_products import INSTANCES, PRODUCTS
from tasks.hardware import load_hardware
from tasks.job_variables import ProvisionError, check_job_variables
from tasks.provision import Placement, launch_of

ROOT = Path(__file__).parents[2]
SNAPSHOTS = ROOT / "tests" / "data" / "manifests"
GPUS = {gpu.name: gpu for gpu in load_hardware()}
WORKLOAD = Workload.from_totals(10_000, 5_000_000, 2_000_000, max_completion_tokens=1024)


def template(provider):
    return json.loads((ROOT / "deployments" / f"{provider}.json").read_text())


def shape(layers, hidden, ffn, heads, kv_heads):
    return model_shape(
        {
            "model_type": "llama",
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
    )


LLAMA_8B, LLAMA_70B = shape(32, 4096, 14336, 32, 8), shape(80, 8192, 28672, 64, 8)
LLAMA_405B = shape(126, 16384, 53248, 128, 16)
PLAIN = {"quantizations": ("none",)}
NODE = Placement(weights_host_path="/mnt/nvme/nightjar", image="registry.example/nightjar:1")

# name -> model, GPU type, what is fixed, where things go
TIERS = {
    "8b-1xl4": (LLAMA_8B, "L4", Options(**PLAIN, tensor_parallel_size=1, replicas=1), Placement()),
    "70b-4xa100": (LLAMA_70B, "A100-80", Options(**PLAIN, tensor_parallel_size=4, replicas=1), NODE),
    "70b-zero-1xh100": (LLAMA_70B, "H100", Options(**PLAIN, backend="zero", tensor_parallel_size=1, replicas=1), NODE),
    "405b-16xh100": (LLAMA_405B, "H100", Options(**PLAIN, tensor_parallel_size=16, replicas=1), NODE),
}  # fmt: skip


# Every GPU type there is: one card, a whole host, and two hosts where there is tensor parallel over hosts.
EVERY_TIER = [
    (gpu.name, ranks)
    for gpu in GPUS.values()
    for ranks in (1, gpu.gpus_per_host, 2 * gpu.gpus_per_host)
]
# The templates ask for nvidia.com/gpu; a card of another maker needs a template of its own.
NVIDIA = [(gpu, ranks) for gpu, ranks in EVERY_TIER if gpu != "MI300X"]


def variables_of(gpu, ranks, provider):
    """Job variables of a replica of 65 GB of weights on so many cards."""
    model, _, options, _ = TIERS["8b-1xl4"]
    some = choose_tier(model, [GPUS["L4"]], WORKLOAD, options=options)
    tier = dataclasses.replace(some, gpu=gpu, num_gpus=ranks, tensor_parallel_size=ranks)
    launch = launch_of(
        tier,
        GPUS[gpu],
        provider=provider,
        weight_file_bytes=65 * 10**9,
        placement=Placement(launcher="srun --nodes={hosts} --gres=gpu:{gpus} --mem={memory_mib}M"),
    )
    return launch.job_variables


def test_the_job_variables_of_every_tier_on_every_provider_are_as_recorded():
    found = {}
    for gpu, ranks in EVERY_TIER:
        for provider in ("process", "kubernetes", "ecs", "command"):
            try:
                values = variables_of(gpu, ranks, provider)
            except ProvisionError as error:
                values = str(error)
            found[f"{ranks}x {gpu} by {provider}"] = values
    recorded = SNAPSHOTS / "job_variables.json"
    if os.environ.get("NIGHTJAR_RECORD"):
        recorded.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(recorded.read_text())
    refused = {name for name, values in found.items() if isinstance(values, str)}
    over_two_hosts = {
        f"{ranks}x {gpu} by {provider}"
        for gpu, ranks in EVERY_TIER
        for provider in ("process", "ecs")
        if ranks > GPUS[gpu].gpus_per_host
    }
    nowhere = {f"{ranks}x {gpu} by ecs" for gpu, ranks in EVERY_TIER if gpu not in INSTANCES}
    nowhere |= {f"{ranks}x {gpu} by kubernetes" for gpu, ranks in EVERY_TIER if gpu not in PRODUCTS}
    assert refused == over_two_hosts | nowhere


def variables(name, provider):
    model, gpu, options, placement = TIERS[name]
    tier = choose_tier(model, [GPUS[gpu]], WORKLOAD, options=options)
    launch = launch_of(
        tier,
        GPUS[gpu],
        provider=provider,
        weight_file_bytes=model.weight_bytes(),
        placement=placement,
    )
    return launch.job_variables


def render(provider, values):
    """What Prefect makes of the template: defaults, then the given values, unset ones dropped."""
    base = template(provider)
    check_job_variables(values, base)
    defaults = {
        key: schema["default"]
        for key, schema in base["variables"]["properties"].items()
        if schema.get("default") is not None
    }
    return apply_values(base["job_configuration"], {**defaults, **values})


@pytest.mark.parametrize("name", TIERS)
def test_the_kubernetes_job_of_a_tier_is_as_recorded(name):
    values = {**variables(name, "kubernetes"), "namespace": "batch", "name": "replica"}
    rendered = render("kubernetes", values)["job_manifest"]
    recorded = SNAPSHOTS / f"{name}.kubernetes.json"
    if os.environ.get("NIGHTJAR_RECORD"):
        recorded.parent.mkdir(parents=True, exist_ok=True)
        recorded.write_text(json.dumps(rendered, indent=2) + "\n")
    assert rendered == json.loads(recorded.read_text())


@pytest.mark.parametrize("name", TIERS)
def test_shared_memory_and_gpus_of_a_job_are_within_its_limits(name):
    spec = render("kubernetes", variables(name, "kubernetes"))["job_manifest"]["spec"]
    pod = spec["template"]["spec"]
    limits, requests = (pod["containers"][0]["resources"][k] for k in ("limits", "requests"))
    shm = next(v for v in pod["volumes"] if v["name"] == "dshm")["emptyDir"]
    weights = next(v for v in pod["volumes"] if v["name"] == "weights")
    assert shm["medium"] == "Memory"
    assert int(shm["sizeLimit"].removesuffix("Gi")) < int(limits["memory"].removesuffix("Gi"))
    assert limits["memory"] == requests["memory"]
    assert limits["nvidia.com/gpu"] == requests["nvidia.com/gpu"] >= 1
    assert len(weights.keys() & {"hostPath", "emptyDir"}) == 1
    assert pod["terminationGracePeriodSeconds"] == 120
    assert spec["completions"] == spec["parallelism"]
    assert (spec["completions"] > 1) == (spec["completionMode"] == "Indexed")


def kubernetes_manifest(values):
    """The manifest that the real worker sends, checked by the strict schema."""
    worker = pytest.importorskip(
        "prefect_kubernetes.worker", reason="needs the provision-test extra"
    )
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="needs the provision-test extra"
    )
    # Its client looks for a cluster when it is resolved against a server; a template needs neither.
    configuration = worker.KubernetesWorkerJobConfiguration(
        **render("kubernetes", {**values, "namespace": "batch"})
    )
    flow_run = FlowRun(flow_id=uuid.uuid4(), name="replica-0", parameters={})
    configuration.prepare_for_flow_run(flow_run, flow=Flow(name="generate-shards"))
    manifest = copy.deepcopy(configuration.job_manifest)
    # Prefect wants these two in the pod's spec, where the schema knows no such fields.
    for key in ("completions", "parallelism"):
        manifest["spec"]["template"]["spec"].pop(key)
    kubernetes_validate.validate(manifest, "1.37", strict=True)
    return manifest


@pytest.mark.parametrize("name", TIERS)
def test_the_real_kubernetes_worker_makes_a_manifest_of_strict_schema(name):
    manifest = kubernetes_manifest(variables(name, "kubernetes"))
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env["NIGHTJAR_LEADER"] == "$(JOB_NAME)-0.nightjar-ranks"
    # A name is expanded from variables that come before it.
    names = [entry["name"] for entry in container["env"]]
    assert names.index("JOB_NAME") < names.index("NIGHTJAR_LEADER")


@pytest.mark.parametrize(("gpu", "ranks"), NVIDIA)
def test_every_tier_s_manifest_is_of_strict_schema_and_indexed_over_its_hosts(gpu, ranks):
    spec = kubernetes_manifest(variables_of(gpu, ranks, "kubernetes"))["spec"]
    hosts = -(-ranks // GPUS[gpu].gpus_per_host)
    assert (spec["completions"], spec["parallelism"]) == (hosts, hosts)
    assert spec["completionMode"] == ("Indexed" if hosts > 1 else "NonIndexed")
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] * hosts == ranks
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env["NIGHTJAR_NUM_HOSTS"] == str(hosts)
    assert int(env["NIGHTJAR_GPUS_PER_HOST"]) * hosts == ranks


@pytest.mark.parametrize(
    ("gpu", "ranks"),
    [(gpu, n) for gpu, n in EVERY_TIER if gpu in INSTANCES and n <= GPUS[gpu].gpus_per_host],
)
def test_every_tier_s_ecs_task_passes_botocore_and_asks_for_its_gpus(gpu, ranks):
    task = render("ecs", variables_of(gpu, ranks, "ecs"))["task_definition"]
    task |= {"cpu": str(task["cpu"]), "memory": str(task["memory"])}
    assert ecs_report("RegisterTaskDefinition", task) == ""
    (container,) = task["containerDefinitions"]
    assert container["resourceRequirements"] == [{"type": "GPU", "value": str(ranks)}]


def test_the_strict_schema_refuses_a_misspelt_field():
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="needs the provision-test extra"
    )
    manifest = render("kubernetes", {**variables("8b-1xl4", "kubernetes"), "name": "x", "env": {}})[
        "job_manifest"
    ]
    pod = manifest["spec"]["template"]["spec"]
    for key in ("completions", "parallelism"):
        pod.pop(key)
    pod["nodeSelectr"] = pod.pop("nodeSelector")
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelectr"):
        kubernetes_validate.validate(manifest, "1.37", strict=True)


@cache
def ecs_model():
    import botocore.session

    return botocore.session.get_session().get_service_model("ecs")


def ecs_report(operation, params):
    """Botocore's opinion of a request; empty when it is right."""
    from botocore.validate import ParamValidator

    found = ParamValidator().validate(params, ecs_model().operation_model(operation).input_shape)
    return found.generate_report()


@pytest.mark.parametrize("name", [name for name in TIERS if name != "405b-16xh100"])
def test_the_ecs_task_of_a_tier_asks_for_its_gpus_and_memory(name):
    values = variables(name, "ecs")
    rendered = render("ecs", values)
    task = rendered["task_definition"]
    # The worker turns these two into strings before it sends the definition.
    task |= {"cpu": str(task["cpu"]), "memory": str(task["memory"])}
    assert ecs_report("RegisterTaskDefinition", task) == ""
    container = task["containerDefinitions"][0]
    assert container["resourceRequirements"] == [{"type": "GPU", "value": values["gpu_count"]}]
    assert container["linuxParameters"]["sharedMemorySize"] < int(task["memory"])
    assert task["requiresCompatibilities"] == ["EC2"]
    override = rendered["task_run_request"]["overrides"]["containerOverrides"][0]
    assert override["resourceRequirements"] == container["resourceRequirements"]


def test_botocore_refuses_a_gpu_count_that_is_a_number():
    task = render("ecs", variables("8b-1xl4", "ecs"))["task_definition"]
    task |= {"cpu": str(task["cpu"]), "memory": str(task["memory"])}
    task["containerDefinitions"][0]["resourceRequirements"][0]["value"] = 1
    assert "Invalid type for parameter containerDefinitions[0].resourceRequirements[0].value" in (
        ecs_report("RegisterTaskDefinition", task)
    )


def test_what_the_real_ecs_worker_sends_passes_botocore():
    ecs = pytest.importorskip(
        "prefect_aws.workers.ecs_worker", reason="needs the provision-test extra"
    )
    values = {**variables("70b-4xa100", "ecs"), "cluster": "gpu", "env": {"A": "b"}}
    configuration = ecs.ECSJobConfiguration(**render("ecs", values))
    flow_run = FlowRun(flow_id=uuid.uuid4(), name="replica-0", parameters={})
    configuration.prepare_for_flow_run(flow_run, flow=Flow(name="generate-shards"))
    worker = ecs.ECSWorker(work_pool_name="gpu-ecs")
    task = worker._prepare_task_definition(configuration, region="eu-west-1", flow_run=flow_run)
    request = worker._prepare_task_run_request(
        configuration, task, "arn:aws:ecs:x:1:task-definition/n:1", True
    )
    assert ecs_report("RegisterTaskDefinition", task) == ""
    assert ecs_report("RunTask", request) == ""
    assert request["placementConstraints"][0]["expression"].endswith("p4de.*")


@pytest.fixture
def compose():
    return yaml.safe_load((ROOT / "deployments" / "compose.yaml").read_text())


def test_compose_starts_server_database_store_and_workers_from_one_image(compose):
    services = compose["services"]
    assert set(services) == {"postgres", "prefect", "store", "setup", "worker", "replicas"}
    ours = ("prefect", "setup", "worker", "replicas")
    assert {services[name]["image"] for name in ours} == {"nightjar"}
    pools = [services[name]["command"][6] for name in ("worker", "replicas")]
    assert pools == ["nightjar", "gpu-process"]
    assert services["replicas"]["environment"] == services["worker"]["environment"]
    assert services["worker"]["environment"]["PREFECT_API_URL"] == "http://prefect:4200/api"
    assert services["worker"]["environment"]["AWS_ENDPOINT_URL"] == "http://store:8333"
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in published)
    keys = json.loads(compose["configs"]["s3"]["content"])["identities"][0]["credentials"][0]
    assert keys["accessKey"] == services["worker"]["environment"]["AWS_ACCESS_KEY_ID"]
    assert keys["secretKey"] == services["worker"]["environment"]["AWS_SECRET_ACCESS_KEY"]


def test_compose_sets_up_a_nightly_job_and_an_inbox_whose_jobs_the_workers_can_run(compose):
    shell, flag, script = compose["services"]["setup"]["command"]
    assert (shell, flag) == ("sh", "-c")
    words = shlex.split(script.partition("&& exec ")[2])
    args = build_parser().parse_args(words[1:])
    assert args.command == "deploy"
    assert (args.job, args.inbox_job) == ("/jobs/nightly.yaml", "/jobs/inbox.yaml")
    for name in ("setup", "worker", "replicas"):
        assert "./jobs:/jobs:ro" in compose["services"][name]["volumes"]
    jobs = ROOT / "deployments" / "jobs"
    nightly = load_job(jobs / "nightly.yaml")
    check_paths(nightly)
    check_paths(InboxJobs.read(str(jobs / "inbox.yaml")).any_job)
    assert nightly.output.uri.startswith(f"{args.inbox}/results/")
    in_image = Path(str(nightly.input.uri)).relative_to("/opt/nightjar")
    assert (ROOT / in_image).exists()


def test_the_build_context_holds_what_the_image_copies_and_nothing_else_large():
    ignored, *kept = (ROOT / ".dockerignore").read_text().split()
    assert ignored == "*"
    lines = (ROOT / "deployments" / "Dockerfile").read_text().splitlines()
    copied = {
        word.split("/")[0]
        for line in lines
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
        if not word.startswith("--")
    }
    assert copied <= {name.removeprefix("!") for name in kept if name.startswith("!")}


def test_the_image_runs_as_nobody_special_and_copies_what_exists():
    lines = (ROOT / "deployments" / "Dockerfile").read_text().splitlines()
    assert "USER 10001:10001" in lines
    last_stage = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")) :]
    assert not any(re.search(r"\b(pip|curl|wget) ", line) for line in last_stage)
    pod = template("kubernetes")["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == 10001
    # Written by hand beside the code, so not there in every checkout.
    elsewhere = {"README.md"}
    for line in lines:
        if line.startswith("COPY") and "--from" not in line:
            sources = [word for word in line.split()[1:-1] if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources if source not in elsewhere)


def test_the_image_has_what_reads_from_nvme_built_for_any_cpu_where_the_runtime_looks_for_it():
    text = (ROOT / "deployments" / "Dockerfile").read_text()
    build, last = text.split("\nFROM")[-2:]
    assert re.search(r"apt-get install .*build-essential libaio-dev", build)
    (step,) = [line for line in build.splitlines() if "inference.async_io --portable" in line]
    assert step.startswith("RUN ")
    folder = "TORCH_EXTENSIONS_DIR=/opt/nightjar/torch_extensions"
    assert build.index(folder) < build.index(step)  # under what the last stage copies
    assert folder in last
    assert "COPY --from=build /opt/nightjar /opt/nightjar" in last
    assert re.search(r"apt-get install .*libaio1", last)


def entrypoint(tmp_path, *argv, **env):
    """Run the entrypoint with a Python that prints what it was given."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho python "$@"\n')
    fake.chmod(0o755)
    return subprocess.run(
        [ROOT / "deployments" / "entrypoint.sh", *argv],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **env},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout.strip()


def test_the_first_pod_runs_the_flow_and_the_others_join_it(tmp_path):
    assert entrypoint(tmp_path, "echo", "flow run") == "flow run"
    assert entrypoint(tmp_path, "echo", "flow run", JOB_COMPLETION_INDEX="0") == "flow run"
    joined = entrypoint(tmp_path, "echo", "flow run", JOB_COMPLETION_INDEX="1")
    assert joined == "python -m tasks.follow"
