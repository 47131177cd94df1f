"""A job file is understood whole or refused in one line that says what to change."""

import ast
import dataclasses
import inspect
from datetime import UTC, datetime
from typing import get_type_hints

import pytest

from flows.config import JobError, dump_job, load_job
from flows.yaml_text import parse_yaml
from tasks.job import RunConfig

BASE = {"model": {"source": "m"}, "input": {"uri": "in"}, "output": {"uri": "out"}}


def refused(*overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        load_job(BASE, overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_only_source_input_and_output_are_required():
    job = load_job(BASE)
    assert (job.model.source, job.input.uri, job.output.uri) == ("m", "in", "out")
    assert job.sampling.max_tokens == 512


@pytest.mark.parametrize("missing", ["model", "input", "output"])
def test_a_missing_section_is_named(missing):
    with pytest.raises(JobError, match=f"^{missing}: missing"):
        load_job({key: value for key, value in BASE.items() if key != missing})


def test_a_missing_field_is_named_with_its_path():
    with pytest.raises(JobError, match=r"model\.source: missing; .*--set model\.source="):
        load_job({**BASE, "model": {}})


def test_a_misspelt_key_names_the_nearest_known_one():
    assert (
        refused("sampling.max_token=3")
        == "sampling.max_token: unknown key; did you mean max_tokens?"
    )
    assert "known keys are" in refused("engine.zzzz=1")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sampling.max_tokens=many", "sampling.max_tokens: got 'many'"),
        ("sampling.temperature=-1", "sampling.temperature must be between"),
        ("sampling.top_p=0", "sampling.top_p must be above 0"),
        ("engine.backend=vllm", "engine.backend: got 'vllm'"),
        ("engine.max_num_seqs=lots", "or input should be 'auto'"),
        ("shards.max_rows=0", "shards.max_rows: must be at least 1, got 0"),
        ("name=a/b", "name: got 'a/b'"),
        ("run_id=../x", "run_id: got '../x'"),
        ("timezone=Mars/Olympus", "timezone: 'Mars/Olympus' is not known"),
        ("model.trust_remote_code=true", "never run"),
        ("model.allowed_code=[abc]", "model.allowed_code: 'abc' is no SHA-256"),
        ("hardware.stage_budget=much", "hardware.stage_budget: 'much' is no size"),
        ("hardware.stage_budget=0", "hardware.stage_budget: '0' is no size above 0"),
        ("output=3", "output: expected a mapping"),
        ("sampling", "write it as key=value"),
        ("name.first=x", "has no keys below it"),
    ],
)
def test_a_wrong_value_is_refused_by_name(override, named):
    values = {**BASE, "name": "n"}
    with pytest.raises(JobError) as caught:
        load_job(values, overrides=[override])
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "budget.usd=0",
        "hardware.price_per_hour=-1",
        "hardware.replicas=0",
        "hardware.max_replicas=0",
        "hardware.replica_minutes=0",
        "engine.max_num_seqs=0",
        "engine.max_num_batched_tokens=-1",
        "engine.max_model_len=0",
        "engine.tensor_parallel_size=0",
        "canary.rows=-1",
        "canary.max_length_factor=0",
        "canary.max_slowdown=0",
        "canary.max_error_rate=1.5",
        "canary.max_truncated_rate=-0.1",
        "max_failed_rows=-1",
        "metrics.port=0",
        "metrics.port=65536",
    ],
)
def test_amounts_that_mean_nothing_are_refused_by_name_and_value(override):
    name, _, value = override.partition("=")
    message = refused(override)
    assert message.startswith(f"{name}: must be")
    assert f"got {value}" in message
    assert "; leave it out for " in message


def test_tools_without_messages_are_refused():
    message = refused("input.prompt='{a}'", "input.tools_column=t")
    assert message.startswith("input.tools_column: tools go with messages, and prompt is given")


@pytest.mark.parametrize("name", ["output.uri", "input.uri", "model.source"])
@pytest.mark.parametrize("place", ["", "  "])
def test_an_empty_place_is_refused_and_not_the_current_folder(name, place):
    assert refused(f"{name}='{place}'").startswith(f"{name}: empty; give a ")


def test_a_key_that_is_there_twice_is_refused_and_none_of_them_dropped(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("output: {uri: a}\nname: n\noutput: {uri: b}\n")
    with pytest.raises(JobError, match=r"job\.yaml, line 3: 'output' is there twice; keep one"):
        load_job(path)


def test_a_value_that_is_no_yaml_is_refused_with_how_to_quote_it():
    assert refused("input.uri=*.parquet").endswith("""such as --set 'input.uri="TEXT"'""")


def test_a_check_of_ours_is_told_in_its_own_words():
    message = refused("engine.distributed.num_hosts=0")
    assert message == "engine.distributed.num_hosts must be at least 1, got 0"


def test_two_sources_of_prompts_are_refused():
    message = refused("input.prompt='{a}'", "input.messages_column=m")
    assert message == "input: prompt and messages_column are both given; keep one of them"


def test_overrides_are_yaml_values_and_leave_the_rest():
    job = load_job(
        BASE, overrides=["sampling.stop=[a, b]", "shards.target_tokens=2_000", "input.uri=[x, y]"]
    )
    assert job.sampling.stop == ["a", "b"]
    assert job.shards.target_tokens == 2000
    assert job.input.uri == ["x", "y"]


def test_one_stop_string_needs_no_list():
    assert load_job(BASE, overrides=["sampling.stop=END"]).sampling.params().stop == ("END",)


def test_date_is_the_day_in_the_jobs_timezone():
    values = {
        **BASE,
        "timezone": "America/New_York",
        "output": {"uri": "out/{date:%Y-%m-%d}/{date}"},
    }
    job = load_job(values, now=datetime(2026, 11, 25, 3, 0, tzinfo=UTC))
    assert job.output.uri == "out/2026-11-24/2026-11-24"


def test_a_dumped_job_reads_back_equal():
    job = load_job(BASE, overrides=["sampling.stop=[x]", "budget.usd=3"])
    assert load_job(dump_job(job)) == job


def test_broken_yaml_names_file_and_line(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("model: {source: m\ninput: [")
    with pytest.raises(JobError, match=r"job\.yaml, line \d"):
        load_job(path)


def test_an_absent_job_file_is_one_line():
    with pytest.raises(JobError, match="not found; give the path of a YAML file"):
        load_job("nowhere.yaml")


def test_a_job_file_that_is_a_list_is_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(JobError, match="expected a mapping of settings, found a list"):
        load_job(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[on, no, yes]", ["on", "no", "yes"]),
        ("20:00", "20:00"),
        ("2026-11-25", "2026-11-25"),
        ("1e6", 1e6),
        ("2_000_000", 2_000_000),
        ("010", 10),
        ("0x1f", 31),
        ("true", True),
        ("-0.5", -0.5),
        ("~", None),
        ("a: ", {"a": None}),
        ("'12'", "12"),
        ("<<: {a: 1}\nb: 2", {"a": 1, "b": 2}),
    ],
)
def test_yaml_scalars_are_what_people_mean(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


LAUGHS = ", ".join(
    ["&a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("input: {chat_template_kwargs: " + "[" * 3000 + "]" * 3000 + "}", "nested"),
        ("[" * 500_000, "nested too deeply"),
        (f"sampling: {{stop: [{LAUGHS}]}}", "more than 100000 values"),
        (f"input: {{chat_template_kwargs: {{a: [{LAUGHS}]}}}}", "more than 100000 values"),
        ("input: &a {chat_template_kwargs: {k: *a}}", "contains itself"),
        ("sampling: {stop: &a [*a]}", "contains itself"),
        ("name: " + "x" * 2_000_000, "2000006 characters"),
        ("input: {chat_template_kwargs: {1: 2}}", "put it in quotes"),
        ("input: {chat_template_kwargs: {a: !!binary aGk=}}", "not for job files"),
        ("!!python/object/apply:os.system [id]", "not for job files"),
    ],
    ids=range(10),
)
def test_a_job_file_that_means_harm_is_refused_at_once_in_one_line(tmp_path, text, said):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(JobError, match=said) as caught:
        load_job(path)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("timezone=Europe", "timezone: 'Europe' is not known"),  # a folder of zones
        ("timezone=/etc/passwd", "timezone: "),
        ("input.chat_template_kwargs={a: .nan}", "input: cannot be kept as JSON"),
        ("budget.usd=.inf", "budget: cannot be kept as JSON"),
        ('input.prompt="\\ud800"', "input: has half a surrogate pair"),
        ("sampling.top_p=" + "x" * 5000, "sampling.top_p: got 'xxx"),
        ('"a\nb"=1', '"a\\nb": unknown key'),
    ],
)
def test_what_cannot_be_kept_or_shown_is_refused_in_one_short_line(override, named):
    message = refused(override)
    assert message.startswith(named)
    assert len(message) < 500


@pytest.mark.parametrize(
    "placement",
    [
        "{env: {HF_TOKEN: x}}",
        "{env: {AWS_SECRET_ACCESS_KEY: x}}",
        "{job_variables: {env: {db_password: x}}}",
    ],
)
def test_a_credential_in_the_job_is_refused_because_the_job_is_recorded(placement):
    message = refused(f"hardware.placement={placement}")
    assert "looks like a credential" in message
    job = load_job(BASE, overrides=["hardware.placement={env: {NCCL_DEBUG: INFO}}"])
    assert job.hardware.placement.env == {"NCCL_DEBUG": "INFO"}


def test_a_password_in_an_endpoint_is_refused_before_the_job_is_recorded_anywhere():
    message = refused("storage.endpoint_url=https://me:swordfish@s3.example.org")
    assert message.startswith("storage.endpoint_url https://s3.example.org: has a user or password")
    assert "swordfish" not in message


def sections(cls):
    """Yield the dataclasses a job is made of."""
    yield cls
    for hint in get_type_hints(cls).values():
        if dataclasses.is_dataclass(hint):
            yield from sections(hint)


@pytest.mark.parametrize("cls", list(sections(RunConfig)), ids=lambda cls: cls.__name__)
def test_every_setting_of_a_job_has_its_meaning_below_it(cls):
    body = ast.parse(inspect.getsource(cls)).body[0].body
    hints = get_type_hints(cls)
    for node, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.AnnAssign) and not dataclasses.is_dataclass(hints[node.target.id]):
            is_told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert is_told, f"{cls.__name__}.{node.target.id}"
