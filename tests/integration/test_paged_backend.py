"""The paged backend against known texts, on model folders, as the reference backend is."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from inference.backends.paged import PagedBackend
from inference.config import EngineConfig
from inference.errors import EngineConfigError, ModelError
from inference.sampling import SamplingParams
from inference.sequence import Completion, Sequence

DATA = Path(__file__).parents[1] / "data"


def build(model: str, **knobs: Any) -> PagedBackend:
    return PagedBackend(
        EngineConfig(model=str(DATA / "models" / model), backend="paged", dtype="float32", **knobs)
    )


def expectation(case: str) -> dict[str, Any]:
    return json.loads((DATA / "cases" / case / "case.json").read_text())["expect"]


def rows_of(case: str) -> list[dict[str, Any]]:
    return pq.read_table(DATA / "cases" / case / "input.parquet").to_pylist()


def encode(backend: PagedBackend, text: str, kind: str = "chat_template") -> list[int]:
    if kind == "raw_prompt":
        return backend.tokenizer.encode(text)
    text = backend.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return backend.tokenizer.encode(text, add_special_tokens=False)


def run(backend: PagedBackend, given: Iterable[Sequence]) -> dict[int, Completion]:
    backend.submit(given)
    found = {}
    while backend.num_unfinished:
        for completion in backend.step():
            found[completion.seq_id] = completion
    return found


def complete(
    backend: PagedBackend, case: str, sampling: SamplingParams, kind: str = "chat_template"
) -> dict[str, Completion]:
    """Return the completions by the rows' ids."""
    rows = rows_of(case)
    given = [Sequence(i, encode(backend, r["prompt"], kind), sampling) for i, r in enumerate(rows)]
    return {rows[i]["id"]: completion for i, completion in run(backend, given).items()}


def texts(case: str, model: str, **fields: Any) -> dict[str, str]:
    found = complete(build(model), case, SamplingParams(max_tokens=8, **fields))
    return {row_id: completion.text for row_id, completion in found.items()}


REFERENCES = [
    ("A1-left-pad", "tiny-a", 8, {}),
    ("A1-left-pad", "tiny-a", 8, {"max_num_seqs": 3, "max_num_batched_tokens": 7}),
    ("A1-left-pad", "tiny-a", 8, {"max_num_seqs": 24, "max_num_batched_tokens": 50}),
    ("E4-only-new-text", "tiny-a", 8, {"max_num_seqs": 1}),
    ("I2-tied-and-sharded", "tiny-tied-sharded", 8, {}),
    ("I3-sampling-on-in-model", "tiny-a-sampling", 8, {}),
    ("B2-max-length-in-model", "chain-a-maxlen20", 12, {}),
]


@pytest.mark.parametrize("kind", ["chat_template", "raw_prompt"])
@pytest.mark.parametrize(("case", "model", "max_tokens", "knobs"), REFERENCES)
def test_every_batch_gives_the_text_of_one_row_at_a_time(case, model, max_tokens, knobs, kind):
    expected = expectation(case)
    per_id = expected.get("per_id") or expected["runs_1_2_per_id"]
    found = complete(build(model, **knobs), case, SamplingParams(max_tokens=max_tokens), kind)
    assert set(found) == set(per_id)
    for row_id, completion in found.items():
        right = per_id[row_id][kind]
        assert list(completion.token_ids) == right["token_ids"]
        assert completion.text == right["text"]
        assert completion.finish_reason == right["finish_reason"]


def test_a_stop_string_over_several_tokens_is_found_and_cut():
    expected = expectation("E1-stop-across-tokens")
    assert texts("E1-stop-across-tokens", "chain-a", stop=("END",)) == expected["text"]


@pytest.mark.parametrize(
    ("case", "model"),
    [("E2-eos-list", "chain-a"), ("E7-eos-missing-in-model-file", "chain-a-geneos")],
)
def test_every_end_token_ends(case, model):
    assert texts(case, model) == expectation(case)["text"]


def test_every_row_has_its_own_limits():
    backend, rows = build("chain-a"), rows_of("E5-row-parameters")
    given = [
        Sequence(
            i,
            encode(backend, row["prompt"]),
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


def test_logprobs_are_those_of_the_reference_backend():
    from inference.backends.transformers import TransformersBackend

    sampling = SamplingParams(max_tokens=5, logprobs=3)
    model = str(DATA / "models" / "tiny-a")
    found = []
    for kind in (PagedBackend, TransformersBackend):
        backend = kind(EngineConfig(model=model, dtype="float32"))
        found.append(run(backend, [Sequence(i, [5 + i] * (3 + i), sampling) for i in range(4)]))
    for seq_id, completion in found[0].items():
        for mine, theirs in zip(completion.logprobs, found[1][seq_id].logprobs, strict=True):
            assert mine.token_id == theirs.token_id
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [t for t, _ in mine.top] == [t for t, _ in theirs.top]


def test_a_prompt_longer_than_the_model_handles_is_refused():
    backend = build("tiny-a")
    with pytest.raises(ValueError, match=r"300 prompt tokens .* \(256\)"):
        backend.submit([Sequence(0, [5] * 300)])
    assert backend.num_unfinished == 0


def test_a_missing_weight_file_stops_before_anything_is_loaded():
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors"):
        build("tiny-a-missing-shard")


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"max_model_len": 300}, "300.*256"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is fp8"),
        ({"quantization": "fp8"}, "fp8: needs a CUDA device"),
    ],
)
def test_settings_that_cannot_work_are_refused(knobs, words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EngineConfigError, match=words):
        build("tiny-a", **knobs)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"kv_cache_dtype": "fp8"}, "engine.kv_cache_dtype is fp8: .* 8.9 .*; use auto"),
        ({"quantization": "fp8"}, "model.quantization is fp8: .* 8.9 .*; use none"),
    ],
)
def test_a_device_without_fp8_is_refused_before_weights_are_loaded(knobs, words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    monkeypatch.setattr("inference.backends.paged._load", None)
    with pytest.raises(EngineConfigError, match=words):
        build("tiny-a", **knobs)


def test_the_receipt_says_what_was_built_and_done():
    backend = build("tiny-a")
    assert (backend.info.backend, backend.info.dtype) == ("paged", "float32")
    assert backend.info.memory["kv_cache"] > 0
    assert backend.info.memory["weights"] > 0
    run(backend, [Sequence(i, [*range(5, 45), 50 + i]) for i in range(5)])
    stats = backend.stats
    assert stats.num_prompt_tokens == 5 * 41
    assert stats.num_cached_tokens == 4 * 32
    assert 0 < stats.kv_occupancy <= 1
    backend.close()
    backend.close()


def test_a_cache_shorter_than_the_model_shortens_max_model_len_if_it_is_auto(caplog):
    from inference.build_engine import build_engine
    from inference.loading import load_model
    from inference.model import make_paged_model
    from inference.paged_settings import PagedSettings
    from inference.weights import check_model_folder

    def build_small(max_model_len: Any) -> int:
        config = EngineConfig(
            model=str(DATA / "models" / "tiny-a"), dtype="float32", max_model_len=max_model_len
        )
        model = make_paged_model(load_model(check_model_folder(config.model), config))
        settings = replace(PagedSettings.of(config, model), max_num_blocks=6)
        engine, _, _ = build_engine(model, settings, lambda sequence: None)
        return engine.scheduler.max_model_len

    assert build_small("auto") == 5 * 16
    assert "max_model_len is 80 instead of the model's 256" in caplog.text
    with pytest.raises(EngineConfigError, match=r"holds 80 tokens, .* is 200"):
        build_small(200)
