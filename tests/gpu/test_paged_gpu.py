"""The paged engine on CUDA, with its kernels, graphs and steps ahead, gives the plain model's tokens in fp32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from inference.build_engine import build_engine
from inference.model import make_paged_model
from inference.model_runner import ModelRunner
from inference.sampling import SamplingParams
from inference.steps import Step
from tests.paged_cases import (
    CONFIGS,
    expect_too_little,
    make_endless_row,
    model_of,
    prompts_of,
    reference,
    run,
    sequences_of,
    settings_of,
    tokens,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = {"max_num_seqs": 16, "block_size": 16, "min_step_tokens": 8, "max_num_blocks": 400}


def paged(family: str):
    from inference.kernels import fused

    return make_paged_model(model_of(family).cuda(), fused)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "qwen3-moe"])
def test_every_family_gives_the_plain_models_tokens(family):
    sequences = sequences_of(prompts_of(40, shared=18))
    expected = reference(model_of(family).cuda(), sequences)
    completions, _ = run(paged(family), sequences, settings_of(**SETTINGS))
    assert tokens(completions) == expected


def test_experts_are_captured_too():
    sequences = sequences_of(prompts_of(20))
    expected = reference(model_of("qwen3-moe").cuda(), sequences)
    completions, _ = run(paged("qwen3-moe"), sequences, settings_of(**SETTINGS))
    assert tokens(completions) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
        {"temperature": 0.9, "repetition_penalty": 1.2},
        {"temperature": 0.7, "min_tokens": 5, "logprobs": 2},
    ],
)
def test_draws_and_ends_are_the_references(changes):
    sampling = SamplingParams(max_tokens=30, ignore_eos="min_tokens" in changes, **changes)
    sequences = sequences_of(prompts_of(24), sampling)
    expected = reference(model_of("qwen3").cuda(), sequences)
    completions, _ = run(paged("qwen3"), sequences, settings_of(**SETTINGS))
    assert tokens(completions) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.2},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "presence_penalty": 1.5},
        {"temperature": 1.0, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
        {"temperature": 0.8, "min_p": 0.05, "min_tokens": 8, "presence_penalty": -0.5},
    ],
)
def test_penalties_need_no_host_and_rows_without_them_feel_nothing(changes, monkeypatch):
    sampling = SamplingParams(max_tokens=30, ignore_eos=True, **changes)
    sequences = sequences_of(prompts_of(24), sampling)
    plain = sequences_of(prompts_of(24), SamplingParams(max_tokens=30, ignore_eos=True))
    sequences = [pair[i % 2] for i, pair in enumerate(zip(sequences, plain, strict=True))]
    expected = reference(model_of("qwen3").cuda(), sequences)
    monkeypatch.setattr("inference.model_runner.sample", refuse)
    completions, _ = run(paged("qwen3"), sequences, settings_of(**SETTINGS))
    assert tokens(completions) == expected


def test_logprobs_need_no_host_and_are_those_of_the_model(monkeypatch):
    sampling = SamplingParams(
        max_tokens=20, ignore_eos=True, temperature=0.9, presence_penalty=0.5, logprobs=4
    )
    sequences = sequences_of(prompts_of(20), sampling)
    expected = reference(model_of("qwen3").cuda(), sequences)
    monkeypatch.setattr("inference.model_runner.sample", refuse)
    completions, _ = run(paged("qwen3"), sequences, settings_of(**SETTINGS))
    assert tokens(completions) == expected
    model = model_of("qwen3").cuda()
    for sequence in sequences:
        completion = completions[sequence.seq_id]
        ids = torch.tensor([[*sequence.prompt_token_ids, *completion.token_ids]], device="cuda")
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, -21:-1]
        whole = logits.float().log_softmax(-1).cpu()
        best = whole.topk(4).values.tolist()
        for i, entry in enumerate(completion.logprobs):
            assert entry.token_id == completion.token_ids[i]
            assert entry.logprob == pytest.approx(float(whole[i, entry.token_id]), abs=1e-4)
            assert [value for _, value in entry.top] == pytest.approx(best[i], abs=1e-4)


def test_steps_that_the_host_samples_are_counted_too():
    """A row with more end tokens than the kernels look for has the host sample until it is done."""
    slow = SamplingParams(max_tokens=6, stop_token_ids=tuple(range(200, 220)), ignore_eos=True)
    sampling = SamplingParams(max_tokens=25, ignore_eos=True, frequency_penalty=0.5)
    sequences = sequences_of(prompts_of(12), sampling)
    sequences[4] = sequences_of(prompts_of(12), slow)[4]
    expected = reference(model_of("qwen3").cuda(), sequences)
    completions, _ = run(paged("qwen3"), sequences, settings_of(**SETTINGS))
    assert tokens(completions) == expected


def refuse(*args):
    raise AssertionError("the host sampled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_card_chooses_what_the_reference_does_on_the_host(dtype):
    """Penalties round the same on both, over a vocabulary of real size and a history that grows."""
    from inference.kernels import device_sampler
    from inference.sampler import SamplerRow, sample
    from inference.slot_params import STOPPED, SlotParams
    from inference.tally import TokenTally
    from inference.vocabulary import WholeVocabulary

    vocab, count, device = 151_936, 64, torch.device("cuda")
    kinds = [
        SamplingParams(repetition_penalty=1.1, frequency_penalty=0.37, presence_penalty=0.21),
        SamplingParams(),
        SamplingParams(presence_penalty=1.5, min_tokens=4),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5),
    ]
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(0, 3000, (count, 4000), generator=generator).tolist()
    rows = [
        SamplerRow(kinds[i % 4], 77 + i, history[i][:2000], history[i][2000:], {5, 9})
        for i in range(count)
    ]
    tally = TokenTally(count, WholeVocabulary(vocab), device)
    params = SlotParams(count, device, tally)
    for slot, row in enumerate(rows):
        params.write(slot, row)
    slots = torch.arange(count, dtype=torch.int32, device=device)
    last_token, result = torch.zeros_like(slots), torch.zeros_like(slots)
    counts = torch.tensor([0, 0, count, 0, 0, 0, 0, 0], dtype=torch.int32, device=device)
    differing = 0
    for _ in range(8):
        logits = torch.randn(count, vocab, generator=generator) * 3
        logits[:, :3000] += 4
        logits = logits.to(dtype)
        positions = torch.tensor([len(r.token_ids) for r in rows], dtype=torch.int32, device=device)
        device_sampler.sample(
            logits.to(device),
            slots,
            positions,
            counts,
            params.on_device,
            last_token,
            result,
            has_draws=params.has_draws,
            has_floors=params.has_floors,
            has_bans=params.has_bans,
            tally=tally.table,
        )
        found = [token & (STOPPED - 1) for token in result.tolist()]
        expected = sample(logits, rows).token_ids
        greedy = [i for i, row in enumerate(rows) if row.sampling.is_greedy]
        assert [found[i] for i in greedy] == [expected[i] for i in greedy]
        differing += sum(a != b for a, b in zip(found, expected, strict=True))
        for row, token in zip(rows, found, strict=True):
            row.token_ids = [*row.token_ids, token]
    assert differing <= 2  # of 512: log and exp may differ in the last place


@pytest.mark.parametrize("changes", [{}, {"presence_penalty": 0.8, "repetition_penalty": 1.1}])
def test_preemption_with_steps_in_flight_changes_nothing(changes):
    sampling = SamplingParams(max_tokens=60, temperature=0.8, **changes)
    sequences = sequences_of(prompts_of(16), sampling)
    expected = reference(model_of("qwen3").cuda(), sequences, end_token_ids=())
    settings = settings_of(**{**SETTINGS, "max_num_blocks": 24})
    engine, _, _ = build_engine(paged("qwen3"), settings, make_endless_row)
    expect_too_little(engine.scheduler)
    engine.submit(sequences)
    completions = {}
    while engine.num_unfinished:
        completions.update({c.seq_id: c for c in engine.step()})
    assert engine.scheduler.num_preemptions > 0
    assert tokens(completions) == expected


class FullDevice:
    """Calls whatever it stands for with next to no memory free on the device, the first `times`."""

    def __init__(self, call: Callable[..., Any], times: int) -> None:
        self._call = call
        self.times_left = times

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.times_left:
            return self._call(*args, **kwargs)
        self.times_left -= 1
        taken = _all_memory()
        try:
            return self._call(*args, **kwargs)
        finally:
            del taken
            torch.cuda.empty_cache()


def _all_memory() -> list[torch.Tensor]:
    """Take what torch has cached, and of the device all but what it needs itself."""
    torch.cuda.empty_cache()
    taken, size = [], 1 << 30
    while size >= 512:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return taken


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_device_that_is_full_in_warm_up_has_a_smaller_cache(family, times, monkeypatch, caplog):
    sequences = sequences_of(prompts_of(20))
    expected = reference(model_of(family).cuda(), sequences)
    model = paged(family)
    full = FullDevice(ModelRunner.warm_up, times)
    monkeypatch.setattr(ModelRunner, "warm_up", lambda *args, **kwargs: full(*args, **kwargs))
    completions, _ = run(model, sequences, settings_of(**SETTINGS))
    assert not full.times_left
    assert "out of memory in warm-up" in caplog.text
    assert tokens(completions) == expected


def test_a_device_that_is_full_in_a_step_has_smaller_steps(monkeypatch, caplog):
    sequences = sequences_of(prompts_of(20))
    expected = reference(model_of("qwen3").cuda(), sequences)
    model = paged("qwen3")
    launch, steps = ModelRunner.launch, []
    full = FullDevice(launch, 1)

    def launched(runner: ModelRunner, step: Step) -> Any:
        steps.append(step)
        return (full if len(steps) == 5 else launch)(runner, step)

    monkeypatch.setattr(ModelRunner, "launch", launched)
    completions, _ = run(model, sequences, settings_of(**SETTINGS, use_graphs=False))
    assert "out of memory" in caplog.text
    assert tokens(completions) == expected
