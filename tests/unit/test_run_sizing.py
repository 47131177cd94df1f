"""From a planned run to what its replicas are started with, on each way to get machines."""

import json
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.config import load_job
from inference.config import config_from_json
from inference.errors import EngineConfigError
from inference.precompile import CardFacts, task_for
from inference.sampling_needs import GREEDY, SamplingNeeds
from tasks.job_variables import ProvisionError
from tasks.progress import Progress
from tasks.provision import launch_of
from tasks.run import prepare
from tasks.run_engine import engine_config
from tasks.sizing import choose
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
    tier, gpu = choose(plan(provider="kubernetes", tier="2x H100"))
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
