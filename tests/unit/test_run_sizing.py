"""From a planned run to what its replicas are started with, on each way to get machines."""

import json
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows.config import JobError, dump_job, load_job
from inference.config import config_from_json
from inference.errors import EngineConfigError
from inference.precompile import CardFacts, task_for
from inference.sampling_needs import GREEDY, SamplingNeeds
from tasks.choose_tier import candidates, choose_hardware
from tasks.gpu_products import INSTANCES, PRODUCTS
from tasks.hardware import default_hardware_path, hardware_of, load_hardware
from tasks.job import job_of
from tasks.job_variables import ProvisionError
from tasks.progress import Progress
from tasks.provision import launch_of
from tasks.run import prepare
from tasks.run_engine import engine_config
from tasks.run_record import read_record
from tasks.sizing import choose, planned_workload
from tests.benchmarks.random_model import config_of, write_folder
from tests.pipeline import MODELS


@pytest.fixture
def plan(tmp_path):
    """Return what plans a small model's run with some `hardware`."""
    pq.write_table(pa.table({"prompt": ["one two", "three"] * 20}), tmp_path / "in.parquet")
    made = []

    def planned(
        *,
        model=MODELS / "tiny-a",
        backend="transformers",
        quantization="none",
        sampling=None,
        columns=None,
        **hardware,
    ):
        if columns:
            table = pq.read_table(tmp_path / "in.parquet")
            for name, value in columns.items():
                table = table.append_column(name, pa.array([value] * table.num_rows))
            pq.write_table(table, tmp_path / "in.parquet")
        job = {
            "model": {"source": str(model), "quantization": quantization},
            "input": {
                "uri": str(tmp_path / "in.parquet"),
                "prompt_column": "prompt",
                "chat_template": "none",
            },
            "output": {"uri": str(tmp_path / "out")},
            "sampling": {"max_tokens": 8, **(sampling or {})},
            "engine": {"backend": backend},
            "hardware": hardware,
        }
        work = tmp_path / f"work{len(made)}"
        work.mkdir()
        made.append(prepare(load_job(job), work_dir=work, progress=Progress()))
        return made[-1]

    yield planned
    for run in made:
        run.close()


def test_auto_takes_the_tier_that_the_plan_s_tokens_ask_for_and_says_why(plan):
    tier, gpu = choose(plan(provider="kubernetes"))
    assert tier.gpu == gpu.name
    assert tier.replicas == 1
    assert tier.reason


@pytest.mark.parametrize("provider", ["kubernetes", "ecs", "command"])
def test_auto_is_the_backend_of_the_gpus_that_replicas_are_given_not_of_who_plans(plan, provider):
    run = plan(backend="auto", provider=provider, tier="2x H100", quantization="fp8")
    assert run.backend == engine_config(run).backend == "paged"
    assert choose(run).tier.backend == "paged"


@pytest.mark.parametrize("provider", ["local", "process"])
def test_auto_on_this_machine_without_a_gpu_is_the_plain_backend(plan, provider):
    run = plan(backend="auto", provider=provider)
    assert run.backend == engine_config(run).backend == "transformers"


def test_auto_is_zero_where_the_weights_fit_no_gpu_of_the_job(plan, tmp_path):
    model = write_folder(tmp_path / "model", config_of("32b", layers=16))  # 37 GB, a hole
    run = plan(model=model, backend="auto", provider="kubernetes", tier="1x L4")
    assert run.backend == engine_config(run).backend == "zero"
    assert choose(run).tier.offload in ("cpu", "nvme")


def test_a_named_gpu_and_count_are_kept(plan):
    tier, gpu = choose(plan(backend="auto", provider="kubernetes", tier="2x H100"))
    assert (tier.gpu, tier.tensor_parallel_size, gpu.name) == ("H100", 2, "H100")
    launch = launch_of(tier, gpu, provider="kubernetes", weight_file_bytes=1_000_000)
    assert launch.deployment == "generate-shards/kubernetes"
    assert launch.job_variables["gpu_count"] == 2


def test_a_gpu_that_is_not_in_the_hardware_file_is_refused_with_those_that_are(plan):
    with pytest.raises(EngineConfigError, match=r"'RTX9' is no GPU type .* H100"):
        choose(plan(provider="kubernetes", tier="RTX9"))


def test_what_the_platform_s_owner_fixes_comes_from_the_job_file(plan):
    placement = {"launcher": "srun --gres=gpu:{gpus}", "env": {"A": "b"}}
    run = plan(provider="command", tier="H100", placement=placement)
    tier, gpu = choose(run)
    launch = launch_of(
        tier,
        gpu,
        provider="command",
        weight_file_bytes=1_000_000,
        placement=run.job.hardware.placement,
    )
    assert launch.job_variables["launcher"] == "srun --gres=gpu:1"
    assert launch.job_variables["env"]["A"] == "b"
    with pytest.raises(ProvisionError, match="launcher"):
        launch_of(
            tier,
            gpu,
            provider="command",
            weight_file_bytes=1,
            placement=plan(placement={"launcher": "srun {gpu}"}).job.hardware.placement,
        )


def test_an_engine_is_told_what_the_run_samples_with_and_what_columns_may_override(plan):
    assert engine_config(plan()).sampling_needs == SamplingNeeds()
    told = engine_config(plan(sampling={"temperature": 0.5, "logprobs": 1})).sampling_needs
    assert told == SamplingNeeds(draws=True, logprobs=True)
    told = engine_config(plan(columns={"top_p": 0.9, "max_tokens": 4})).sampling_needs
    assert told == SamplingNeeds(floors=True)


def test_what_the_engine_is_told_reaches_its_ranks_and_is_no_other_kernel(plan):
    pytest.importorskip("triton", reason="Triton is not installed: nothing is compiled")
    config = engine_config(plan(sampling={"temperature": 0.5}))
    assert config_from_json(json.loads(json.dumps(asdict(config)))) == config
    facts = CardFacts(capability=90, num_multiprocessors=132)
    tasks = [
        task_for(facts, {}, c, 1)["done"] for c in (config, replace(config, sampling_needs=GREEDY))
    ]
    assert tasks[0] == tasks[1]


@pytest.fixture
def prices(tmp_path):
    """A hardware file in which the L4 costs nearly nothing."""
    known = yaml.safe_load(default_hardware_path().read_text())
    for name, entry in known.items():
        entry["price_per_hour"] = 0.01 if name == "L4" else 5.0
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(known))
    return path


def test_prices_of_the_job_s_hardware_file_decide_what_a_run_is_given(plan, prices):
    run = plan(backend="auto", provider="kubernetes", file=str(prices))
    tier, gpu = choose(run)
    assert (tier.gpu, gpu.price_per_hour) == ("L4", 0.01)
    foretold = choose_hardware(run.settled_job, str(run.model.path), planned_workload(run.store))
    assert (foretold.device, foretold.price_per_hour) == ("L4", 0.01)


def test_a_replica_elsewhere_knows_the_prices_without_the_file(plan, prices):
    run = plan(provider="kubernetes", file=str(prices))
    prices.unlink()
    job = job_of(read_record(run.store))
    assert {gpu.name: gpu.price_per_hour for gpu in hardware_of(job.hardware)}["L4"] == 0.01
    assert load_job(dump_job(job)) == job


def test_the_job_s_price_goes_with_the_gpu_type_it_names(plan):
    priced = plan(backend="auto", provider="kubernetes", tier="L4", price_per_hour=0.7)
    tier, gpu = choose(priced)
    assert gpu.price_per_hour == 0.7
    assert tier.usd == pytest.approx(0.7 * tier.gpu_hours)


def test_one_price_for_a_choice_of_gpu_types_is_refused(plan):
    run = plan(provider="kubernetes", price_per_hour=2.0)
    with pytest.raises(EngineConfigError, match=r"hardware.price_per_hour is 2, .* hardware\.tier"):
        choose(run)


@pytest.mark.parametrize(
    ("provider", "placement", "expected"),
    [
        ("kubernetes", {"node_selector": {"nvidia.com/gpu.product": "NVIDIA-L40S"}}, ["L40S"]),
        ("kubernetes", {"node_selector": {"pool": "gpus"}}, None),
        ("ecs", {}, list(INSTANCES)),
        ("kubernetes", {}, list(PRODUCTS)),
        ("command", {}, None),
    ],
)
def test_auto_chooses_among_what_the_provider_can_be_asked_for(plan, provider, placement, expected):
    names = [gpu.name for gpu in candidates(plan(provider=provider, placement=placement).job)[0]]
    assert names == (expected or [gpu.name for gpu in load_hardware()])


def test_a_hardware_file_with_a_mistake_is_refused_with_the_job(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("H100: {memory_gib: 80}")
    job = {"model": {"source": "m"}, "input": {"uri": "i"}, "output": {"uri": "o"}}
    with pytest.raises(JobError, match=r"hardware\.file: .*mine\.yaml: hardware H100: unknown key"):
        load_job({**job, "hardware": {"file": str(file)}})
    with pytest.raises(JobError, match=r"hardware\.gpus: hardware H100: bandwidth_gb_s"):
        load_job({**job, "hardware": {"gpus": {"H100": {"memory_gb": 80}}}})
