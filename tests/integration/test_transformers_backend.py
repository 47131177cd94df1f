"""The reference backend against known texts, and when things go wrong."""

import json
import logging
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.backends.transformers import TransformersBackend
from inference.config import EngineConfig
from inference.errors import EngineConfigError, EngineFault, ModelError
from inference.loading import load_model
from inference.offload import Room
from inference.placement import accelerate_options
from inference.sampling import SamplingParams, draw_seed
from inference.sequence import Completion, Sequence
from inference.weights import ModelFolder

DATA = Path(__file__).parents[1] / "data"
MODELS = DATA / "models"


def build(model: str | Path, kind: Any = TransformersBackend, **knobs: Any) -> Any:
    return kind(EngineConfig(model=str(MODELS / model), backend="transformers", **knobs))


def run(backend: TransformersBackend, given: Iterable[Sequence]) -> dict[int, Completion]:
    backend.submit(given)
    found = {}
    while backend.num_unfinished:
        for completion in backend.step():
            found[completion.seq_id] = completion
    return found


def expectation(case: str) -> dict[str, Any]:
    return json.loads((DATA / "cases" / case / "case.json").read_text())["expect"]


def rows_of(case: str, name: str = "input.parquet") -> list[dict[str, Any]]:
    return pq.read_table(DATA / "cases" / case / name).to_pylist()


def encode(backend: TransformersBackend, text: str, kind: str) -> list[int]:
    if kind == "raw_prompt":
        return backend.tokenizer.encode(text)
    text = backend.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return backend.tokenizer.encode(text, add_special_tokens=False)


def complete(
    backend: TransformersBackend, rows: list[dict[str, Any]], kind: str, sampling: SamplingParams
) -> dict[str, Completion]:
    """Return the completions by the rows' ids."""
    given = [Sequence(i, encode(backend, r["prompt"], kind), sampling) for i, r in enumerate(rows)]
    return {rows[i]["id"]: completion for i, completion in run(backend, given).items()}


def texts(case: str, model: str, **fields: Any) -> dict[str, str]:
    sampling = SamplingParams(max_tokens=8, **fields)
    found = complete(build(model, max_num_seqs=2), rows_of(case), "chat_template", sampling)
    return {row_id: completion.text for row_id, completion in found.items()}


REFERENCES = [
    ("A1-left-pad", "tiny-a", 8, (1, 3, 8, 24)),
    ("E4-only-new-text", "tiny-a", 8, (1, 6)),
    ("I2-tied-and-sharded", "tiny-tied-sharded", 8, (1, 5)),
    ("I3-sampling-on-in-model", "tiny-a-sampling", 8, (3,)),
    ("B2-max-length-in-model", "chain-a-maxlen20", 12, (3,)),
]


@pytest.mark.parametrize("kind", ["chat_template", "raw_prompt"])
@pytest.mark.parametrize(
    ("case", "model", "max_tokens", "size"),
    [(case, model, num, size) for case, model, num, sizes in REFERENCES for size in sizes],
)
def test_every_batch_size_gives_the_text_of_one_row_at_a_time(case, model, max_tokens, size, kind):
    expected = expectation(case)
    per_id = expected.get("per_id") or expected["runs_1_2_per_id"]
    backend = build(model, max_num_seqs=size)
    found = complete(backend, rows_of(case), kind, SamplingParams(max_tokens=max_tokens))
    assert set(found) == set(per_id)
    for row_id, completion in found.items():
        right = per_id[row_id][kind]
        assert list(completion.token_ids) == right["token_ids"]
        assert (completion.text, completion.finish_reason) == (
            right["text"],
            right["finish_reason"],
        )


class Placed(TransformersBackend):
    """Loads with a device map of the test's own."""

    device_map: dict[str, str]

    def _load(self, folder, config):
        model = load_model(folder, config, self.device_map)
        return model, torch.device("cpu")


HOST = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize(
    ("case", "model"),
    [("I2-tied-and-sharded", "tiny-tied-sharded"), ("A1-left-pad", "tiny-a")],
)
@pytest.mark.parametrize("places", ["cpu", "disk", "mixed"])
def test_weights_on_the_host_and_on_disk_give_the_same_tokens(case, model, places, tmp_path):
    Placed.device_map = {"": places} if places == "cpu" else HOST | {
        "model.layers.0": "disk" if places == "disk" else "cpu", "model.layers.1": "disk"
    }  # fmt: skip
    backend = build(model, kind=Placed, max_num_seqs=5, nvme_path=str(tmp_path))
    where = {p.device.type for p in backend._model.model.layers[1].parameters()}
    assert where == {"cpu" if places == "cpu" else "meta"}
    per_id = expectation(case).get("per_id")
    found = complete(backend, rows_of(case), "raw_prompt", SamplingParams(max_tokens=8))
    for row_id, right in per_id.items():
        assert list(found[row_id].token_ids) == right["raw_prompt"]["token_ids"]


GB = 10**9


@pytest.mark.parametrize(
    ("devices", "host", "knobs", "expected"),
    [
        ([80], 100, {}, {"device_map": {"": 0}}),
        ([], 100, {}, {}),
        ([40], 100, {}, ("auto", {0: 34, "cpu": 85}, None)),
        ([40, 40], 100, {"offload": "none"}, ("auto", {0: 34, 1: 34, "cpu": 0}, None)),
        ([40], 10, {"offload": "nvme", "nvme_path": "/nvme"}, ("auto", {0: 34, "cpu": 8.5}, "/nvme")),
        ([40], 10, {"quantization": "nf4"}, {"device_map": {"": 0}}),
    ],
)  # fmt: skip
def test_weights_are_spread_only_when_one_device_does_not_hold_them(devices, host, knobs, expected):
    found = accelerate_options(
        Sixty(),
        EngineConfig(model="", **knobs),
        [n * GB for n in devices],
        Room(host * GB, 500 * GB),
    )
    if isinstance(expected, tuple):
        kind, memory, folder = expected
        sizes = {place: int(size * GB) for place, size in memory.items()}
        expected = {"device_map": kind, "max_memory": sizes, "offload_folder": folder}
    assert found == expected


@pytest.mark.parametrize(
    ("devices", "host", "offload", "words"),
    [
        ([40], 100, "none", "60.0 GB of weights; devices take 34.0 GB, host memory 0.0, NVMe 0.0"),
        ([], 50, "cpu", "devices take 0.0 GB, host memory 42.5, NVMe 0.0 .*offload cpu or nvme"),
    ],
)
def test_weights_that_fit_nowhere_are_refused_with_the_arithmetic(devices, host, offload, words):
    config = EngineConfig(model="", offload=offload)
    with pytest.raises(EngineConfigError, match=words):
        accelerate_options(Sixty(), config, [n * GB for n in devices], Room(host * GB, 500 * GB))


class Sixty(ModelFolder):
    """A folder with 60 GB of weights."""

    num_weight_bytes = 60 * GB

    def __init__(self) -> None:
        super().__init__(path=Path("/m"), config={}, weight_files=(), content_id="")


def test_three_files_one_after_the_other_are_all_right():
    backend = build("chain-a", max_num_seqs=4)
    per_id = expectation("A4-three-files-one-process")["per_id"]
    found = {}
    for part in range(3):
        rows = rows_of("A4-three-files-one-process", f"input/part-{part}.parquet")
        found |= complete(backend, rows, "chat_template", SamplingParams(max_tokens=8))
    assert {row_id: c.text for row_id, c in found.items()} == {
        row_id: right["chat_template"]["text"] for row_id, right in per_id.items()
    }


@pytest.mark.parametrize("size", [1, 4, 12])
def test_a_row_draws_the_same_in_any_order_and_company(size):
    sampling = SamplingParams(max_tokens=8, temperature=0.9, seed=1234)

    def draw(name: str, max_num_seqs: int) -> dict[str, tuple[int, ...]]:
        backend = build("tiny-a", max_num_seqs=max_num_seqs)
        rows = rows_of("A3-seed-and-order", name)
        given = [
            Sequence(i, encode(backend, r["prompt"], "chat_template"), sampling,
                     draw_seed(1234, r["id"], 0))
            for i, r in enumerate(rows)
        ]  # fmt: skip
        return {rows[i]["id"]: c.token_ids for i, c in run(backend, given).items()}

    whole = draw("input.parquet", 4)
    assert draw("input_reversed.parquet", size) == whole
    subset = draw("input_subset.parquet", size)
    assert 0 < len(subset) < len(whole)
    assert subset.items() <= whole.items()
    assert len(set(whole.values())) > len(whole) // 2


def test_a_prompt_longer_than_the_model_handles_is_refused_and_the_others_are_right():
    backend = build("tiny-a", max_num_seqs=4)
    expected = expectation("B1-one-long-row")
    found = {}
    for i, row in enumerate(rows_of("B1-one-long-row")):
        token_ids = encode(backend, row["prompt"], "chat_template")
        sequence = Sequence(i, token_ids, SamplingParams(max_tokens=8))
        if row["id"] in expected["error_rows"]:
            with pytest.raises(ValueError, match=r"988 prompt tokens .* \(256\)"):
                backend.submit([sequence])
        else:
            found[row["id"]] = run(backend, [sequence])[i].text
    assert found == {k: right["chat_template"]["text"] for k, right in expected["per_id"].items()}


def test_a_stop_string_over_several_tokens_is_found_and_cut():
    expected = expectation("E1-stop-across-tokens")
    assert texts("E1-stop-across-tokens", "chain-a", stop=("END",)) == expected["text"]


@pytest.mark.parametrize(
    ("case", "model"),
    [("E2-eos-list", "chain-a"), ("E7-eos-missing-in-model-file", "chain-a-geneos")],
)
def test_every_end_token_ends(case, model):
    assert texts(case, model) == expectation(case)["text"]


def test_an_end_token_given_as_a_stop_string_ends_too():
    given = {"ignore_eos": True, "stop": ("<|im_end|>", "<|endoftext|>")}
    found = texts("E7-eos-missing-in-model-file", "chain-a-geneos", **given)
    assert found == expectation("E7-eos-missing-in-model-file")["text"]


def test_a_character_over_four_tokens_is_whole_and_its_cut_is_harmless():
    backend, rows = build("chain-a"), rows_of("E3-emoji-over-four-tokens")
    expected = expectation("E3-emoji-over-four-tokens")
    found = complete(backend, rows, "chat_template", SamplingParams(max_tokens=8))
    assert {row_id: c.text for row_id, c in found.items()} == expected["run_1_text"]
    cut = complete(backend, rows, "chat_template", SamplingParams(max_tokens=3))["e3-0"]
    assert list(cut.token_ids) == expected["run_2_token_ids"]
    assert cut.finish_reason == "length"
    assert cut.text.encode("utf-8").startswith(b"Fox ")


def test_every_row_has_its_own_limits():
    backend, rows = build("chain-a", max_num_seqs=4), rows_of("E5-row-parameters")
    given = [
        Sequence(
            i,
            encode(backend, row["prompt"], "chat_template"),
            SamplingParams(
                max_tokens=row["max_tokens"] or 8,
                stop_token_ids=tuple(row["stop_token_ids"] or ()),
                temperature=row["temperature"] or 0.0,
            ),
        )
        for i, row in enumerate(rows)
    ]
    found = {rows[i]["id"]: c.text for i, c in run(backend, given).items()}
    assert found == expectation("E5-row-parameters")["text"]


def test_a_missing_weight_file_stops_before_anything_is_loaded():
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors"):
        build("tiny-a-missing-shard")


def test_a_weight_that_is_in_no_file_is_never_made_up(tmp_path):
    folder = Path(shutil.copytree(MODELS / "tiny-a", tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing keys.*model\.layers\.1\.mlp\.up_proj"):
        build(folder)


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path):
    folder = Path(shutil.copytree(MODELS / "tiny-a", tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        build(folder)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"max_model_len": 300}, "300.*256"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is fp8"),
        ({"quantization": "fp8"}, "fp8.*paged"),
    ],
)
def test_settings_that_cannot_work_are_refused(knobs, words):
    with pytest.raises(EngineConfigError, match=words):
        build("tiny-a", **knobs)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_eight_bit_weights_are_smaller_and_every_row_is_there():
    backend = build("tiny-a", quantization="int8", max_num_seqs=8)
    assert backend.info.memory["weights"] < build("tiny-a").info.memory["weights"]
    found = complete(backend, rows_of("A1-left-pad"), "raw_prompt", SamplingParams(max_tokens=8))
    assert len(found) == 24
    assert all(completion.error is None for completion in found.values())


def test_dtype_is_what_was_asked_for_or_what_the_config_says():
    assert build("tiny-a").info.dtype == "float32"
    assert build("tiny-a", dtype="bfloat16").info.dtype == "bfloat16"


class SmallDevice(TransformersBackend):
    """A device that holds no more than `max_cells` tokens of KV cache."""

    max_cells = 10_000
    message: str | None = None

    def _forward(self, batch):
        if len(batch.rows) * (batch.num_columns + 1) > self.max_cells:
            if self.message is not None:
                raise RuntimeError(self.message)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super()._forward(batch)


def varied(num: int) -> list[Sequence]:
    return [
        Sequence(
            i,
            [3 + (7 * i + 11 * k) % 250 for k in range(4 + i % 9)],
            SamplingParams(max_tokens=30, temperature=0.8 * (i % 2), ignore_eos=True, logprobs=1),
            draw_seed=i,
        )
        for i in range(num)
    ]


@pytest.mark.parametrize(
    "message", [None, "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"]
)
def test_out_of_memory_halves_the_batch_and_changes_no_token(caplog, message):
    expected = run(build("tiny-a", max_num_seqs=8), varied(20))
    backend = build("tiny-a", kind=SmallDevice, max_num_seqs=8)
    backend.max_cells, backend.message = 130, message
    with caplog.at_level(logging.WARNING, "inference"):
        found = run(backend, varied(20))
    assert {i: c.token_ids for i, c in found.items()} == {
        i: c.token_ids for i, c in expected.items()
    }
    assert {c.finish_reason for c in found.values()} == {"length"}
    assert backend.stats.num_preemptions > 0
    assert backend.stats.num_prompt_tokens == sum(len(s.prompt_token_ids) for s in varied(20))
    assert "going on with at most 4 at once" in caplog.text


def test_a_sequence_that_does_not_fit_alone_fails_and_the_others_finish(caplog):
    backend = build("tiny-a", kind=SmallDevice, max_num_seqs=4)
    backend.max_cells = 40
    given = [*varied(4), Sequence(9, [5] * 60, SamplingParams(max_tokens=4, ignore_eos=True))]
    found = run(backend, given)
    assert found[9].finish_reason == "error"
    assert "out of memory" in str(found[9].error)
    assert [found[i].finish_reason for i in range(4)] == ["length"] * 4
    assert backend.num_unfinished == 0


def test_any_other_failure_of_the_model_is_a_fault_of_the_engine():
    backend = build("tiny-a", kind=SmallDevice)
    backend.max_cells, backend.message = 1, "CUDA error: an illegal memory access"
    backend.submit(varied(3))
    with pytest.raises(EngineFault, match="illegal memory access"):
        backend.step()


class Broken(TransformersBackend):
    """A model that gives NaN for the first row of every batch."""

    def _forward(self, batch):
        logits = super()._forward(batch).clone()
        logits[0, 3] = torch.nan
        return logits


def test_a_row_without_usable_logits_fails_and_the_others_finish():
    found = run(build("tiny-a", kind=Broken, max_num_seqs=2), varied(6))
    reasons = [found[i].finish_reason for i in range(6)]
    assert reasons.count("error") == 6  # each row is first in its batch sooner or later
    assert all("NaN" in str(completion.error) for completion in found.values())


def test_rows_leave_the_batch_as_they_finish_and_the_rest_stays_right():
    sizes = [1, 2, 3, 5, 8, 13, 21, 34]
    given = [Sequence(i, [5 + i, 9, 40 + i], SamplingParams(max_tokens=n, ignore_eos=True))
             for i, n in enumerate(sizes)]  # fmt: skip
    found = run(build("tiny-a", max_num_seqs=8), given)
    alone = run(build("tiny-a", max_num_seqs=1), given)
    assert found == alone
    assert [len(found[i].token_ids) for i in range(8)] == sizes


def test_no_sequence_waits_forever_behind_longer_ones():
    backend = build("tiny-a", max_num_seqs=2)
    short = Sequence(0, [5], SamplingParams(max_tokens=2, ignore_eos=True))
    backend.submit([short])
    number, left = 1, True
    for _ in range(400):
        if backend.num_waiting < 40:
            longer = range(number, number + 8)
            backend.submit(
                Sequence(i, [5] * 20, SamplingParams(max_tokens=2, ignore_eos=True)) for i in longer
            )
            number += 8
        if any(completion.seq_id == 0 for completion in backend.step()):
            left = False
            break
    assert not left


class Watching(TransformersBackend):
    """Notes the size of every prefill as (rows, columns)."""

    prefills: list[tuple[int, int]]

    def _forward(self, batch):
        if batch.is_new:
            self.prefills.append((len(batch.rows), batch.num_columns))
        return super()._forward(batch)


def test_a_prefill_takes_no_more_tokens_than_allowed_or_one_row():
    backend = build("tiny-a", kind=Watching, max_num_seqs=16, max_num_batched_tokens=40)
    backend.prefills = []
    given = [Sequence(i, [5] * (1 + i), SamplingParams(max_tokens=1)) for i in range(50)]
    assert len(run(backend, given)) == 50
    assert all(rows == 1 or rows * columns <= 40 for rows, columns in backend.prefills)
    assert max(rows for rows, _ in backend.prefills) > 4


def test_neighbours_in_a_batch_are_of_like_length():
    backend = build("tiny-a", kind=Watching, max_num_seqs=5)
    backend.prefills = []
    lengths = [1 + (37 * i) % 100 for i in range(50)]
    run(
        backend, [Sequence(i, [5] * n, SamplingParams(max_tokens=1)) for i, n in enumerate(lengths)]
    )
    padded = sum(rows * columns for rows, columns in backend.prefills)
    assert padded < 1.1 * sum(lengths)
