"""What four ranks do in tests of tensor parallel: `python -m tests.rank_cases DOCUMENT`, under a launcher.

DOCUMENT names the model folders and the file that rank r writes its findings to. One world runs every case, in
groups of its own: two groups of two beside each other, three of the four ranks, all four.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from inference.arriving import Arriving
from inference.build_engine import build_engine
from inference.config import DistributedConfig, EngineConfig
from inference.errors import EngineConfigError, ModelError
from inference.kernels import plain
from inference.load_weights import load_weights
from inference.model import PagedModel, make_paged_model
from inference.partition import cut, load_partition
from inference.preflight_collective import check_fabric
from inference.quantised_loading import load_quantised
from inference.sampler import SamplerRow, sample
from inference.sampling import SamplingParams
from inference.tensor_parallel import TensorParallel
from inference.vocabulary import PartitionedVocabulary, columns_of
from inference.weights import check_model_folder
from inference.world import Place, join_world, leave_world, tensor_parallel_group
from tests.full_precision import measured_full_precision
from tests.paged_cases import COMMON, make_row, prompts_of, run, sequences_of, settings_of, tokens

TIMEOUT_S = 120.0
HEADS: dict[str, Any] = {**COMMON, "num_attention_heads": 8, "num_key_value_heads": 4}
SAMPLINGS = [
    SamplingParams(max_tokens=12, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0.9, logprobs=3),
    SamplingParams(max_tokens=12, temperature=1.1, top_k=7, min_tokens=5),
    SamplingParams(max_tokens=12, temperature=0.8, top_p=0.7, min_p=0.02),
    SamplingParams(max_tokens=12, repetition_penalty=1.4, frequency_penalty=0.2, logprobs=0),
]


def load(folder: str, ranks: TensorParallel) -> Any:
    config = EngineConfig(model=folder, dtype="float32")
    if ranks.size > 1:
        files = Arriving.whole(check_model_folder(folder).path)
        return load_partition(files, config, ranks, torch.device("cpu"))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def generate(
    folder: str, ranks: TensorParallel, *, seed: int, is_fused: bool = True
) -> dict[int, Any]:
    """Completions of sequences that are sampled in every way."""
    make = make_paged_model if is_fused else PagedModel
    model = make(load(folder, ranks), ranks=ranks)
    sequences = []
    for index, sampling in enumerate(SAMPLINGS):
        for sequence in sequences_of(prompts_of(3, shared=9, seed=seed + index), sampling):
            sequence.seq_id += 10 * index
            sequences.append(sequence)
    completions, _ = run(model, sequences, settings_of())
    return completions


def compare(folder: str, ranks: TensorParallel, *, seed: int, is_fused: bool = True) -> str:
    """Return what differs from one rank; empty if nothing does."""
    found = generate(folder, ranks, seed=seed, is_fused=is_fused)
    expected = generate(folder, TensorParallel.alone(), seed=seed)
    if tokens(found) != tokens(expected):
        return f"tokens {tokens(found)} instead of {tokens(expected)}"
    for seq_id, completion in expected.items():
        for here, there in zip(
            found[seq_id].logprobs or (), completion.logprobs or (), strict=True
        ):
            pairs = [(here.logprob, there.logprob), *zip(here.top, there.top, strict=True)]
            for a, b in pairs:
                if not torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-5):
                    return f"logprobs {here} instead of {there}"
    return ""


def quantised_while_read(folder: str, ranks: TensorParallel, *, seed: int) -> str:
    """A rank's part that is quantised while it is read gives the tokens of one that is quantised afterwards.

    And it is never held in full precision.
    """
    files = Arriving.whole(check_model_folder(folder).path)
    config = EngineConfig(model=folder, dtype="float32", quantization="fp8")
    with measured_full_precision() as found:
        model = load_quantised(files, config, ranks, torch.device("cpu"), plain)
    part = load(folder, ranks)
    layer_bytes = sum(p.nbytes for p in part.base_model.layers[1].parameters())
    beside = sum(p.nbytes for p in part.parameters()) - len(part.base_model.layers) * layer_bytes
    whole = make_paged_model(part, is_fp8=True, ranks=ranks)
    runs = [
        tokens(run(it, sequences_of(prompts_of(6, seed=seed)), settings_of())[0])
        for it in (model, whole)
    ]
    if max(found) > beside + 2 * layer_bytes:
        return f"{max(found) - beside} bytes of layers of {layer_bytes} at once"
    return "" if runs[0] == runs[1] else f"tokens {runs[0]} instead of {runs[1]}"


def compare_stored(folders: str, ranks: TensorParallel, *, seed: int) -> str:
    """As `compare`, for a checkpoint in fp8 blocks and the one in full precision that it stands for."""
    stored, whole = folders.split(":")
    found = tokens(generate(stored, ranks, seed=seed))
    expected = tokens(generate(whole, TensorParallel.alone(), seed=seed))
    return "" if found == expected else f"tokens {found} instead of {expected}"


def scale_missing(folder: str, ranks: TensorParallel) -> str:
    """A weight in fp8 whose scale is not there is refused by name."""
    try:
        load(folder, ranks)
    except ModelError as error:
        is_right = "stored as fp8 in blocks but its scale is missing" in str(error)
        return "" if is_right else str(error)
    return "a weight without scale was loaded"


def broken_rows(ranks: TensorParallel) -> str:
    """A NaN in one rank's columns, and a tie across ranks, look the same to all."""
    logits = torch.zeros(3, 10)
    logits[0, 9] = torch.nan
    logits[1, [2, 8]] = 5.0
    logits[2] = -torch.inf
    rows = [SamplerRow(SamplingParams(), 0, [1]) for _ in range(3)]
    here = slice(*columns_of(10, ranks.rank, ranks.size))
    found = sample(logits[:, here], rows, PartitionedVocabulary(10, ranks)).token_ids
    return "" if found == [-1, 2, -1] else f"{found}"


def least_blocks(folder: str, ranks: TensorParallel) -> str:
    """Ranks with different room for KV blocks use the same number, the least."""
    model = make_paged_model(load(folder, ranks), ranks=ranks)
    settings = settings_of(max_num_blocks=40 + 3 * ranks.rank, max_model_len=60)
    engine, _, _ = build_engine(model, settings, make_row)
    found = engine.scheduler.blocks.num_usable_blocks
    return "" if found == 39 else f"{found} usable blocks"


def fabric(ranks: TensorParallel) -> str:
    """The preflight measures, knows all ranks, and refuses what is slower than asked for."""
    device = torch.device("cpu")
    found = check_fabric(ranks, device, DistributedConfig())
    if not (found.bandwidth > 0 and found.latency_us > 0 and len(found.facts) == ranks.size):
        return f"{found}"
    try:
        check_fabric(ranks, device, DistributedConfig(min_bandwidth=1e6))
    except EngineConfigError as error:
        is_right = f"all-reduce over {ranks.size} ranks reaches" in str(error)
        return "" if is_right else str(error)
    return "accepted a fabric that is too slow"


REFUSED = {
    "Olmo2Config": "model.layers.0.self_attn normalises over all heads, of model_type olmo2",
    "Phi3Config": "it has a layer model.layers.0.self_attn.qkv_proj, of model_type phi3",
    "GPT2Config": "no rule of tensor parallel covers any layer of model_type gpt2",
    "MixtralConfig": "experts of model_type mixtral cannot be partitioned yet",
}


def refusals(ranks: TensorParallel) -> str:
    """Models that would give wrong tokens if they were cut are refused by what is in the way."""
    for name, reason in REFUSED.items():
        config = getattr(transformers, name)(**HEADS)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        try:
            cut(model, ranks)
        except EngineConfigError as error:
            if reason in str(error):
                continue
            return str(error)
        return f"{name} was cut"
    return ""


def weight_bytes(folder: str, ranks: TensorParallel) -> str:
    """A rank holds its part of everything that is partitioned, and nothing twice."""
    whole = sum(t.nbytes for _, t in load_weights(sorted(Path(folder).glob("*.safetensors"))))
    held = sum(p.nbytes for p in load(folder, ranks).parameters())
    share = held / whole
    return "" if share < 0.65 else f"a rank holds {share:.2f} of the weights"


def main(document: dict[str, Any]) -> None:
    place = Place.from_environment()
    join_world(place, timeout_s=TIMEOUT_S)
    pair = tensor_parallel_group(2, timeout_s=TIMEOUT_S)
    three = dist.new_group([0, 1, 2])
    four = tensor_parallel_group(4, timeout_s=TIMEOUT_S)
    folders: dict[str, str] = document["models"]
    seed = 100 * (place.rank // 2)  # the pairs have different work
    cases: dict[str, Callable[[], str]] = {
        "pair-dense": lambda: compare(folders["dense"], pair, seed=seed),
        "pair-tied-with-biases": lambda: compare(folders["tied"], pair, seed=seed),
        "pair-moe": lambda: compare(folders["moe"], pair, seed=seed),
        "pair-experts-of-the-class": lambda: compare(
            folders["moe"], pair, seed=seed, is_fused=False
        ),
        "pair-shared-experts": lambda: compare(folders["shared"], pair, seed=seed),
        "pair-unmodified-class": lambda: compare(folders["dense"], pair, seed=seed, is_fused=False),
        "pair-fp8-blocks": lambda: compare_stored(folders["blocks"], pair, seed=seed),
        "pair-fp8-blocks-of-experts": lambda: compare_stored(
            folders["expert-blocks"], pair, seed=seed
        ),
        "four-fp8-blocks-cut-within": lambda: compare_stored(
            folders["expert-blocks"], four, seed=7
        ),
        "pair-fp8-scale-missing": lambda: scale_missing(folders["no-scale"], pair),
        **{
            f"pair-{name}-while-read": partial(
                quantised_while_read, folders[f"deep-{name}"], pair, seed=seed
            )
            for name in ("dense", "tied", "moe")
        },
        "pair-refusals": lambda: refusals(pair),
        "pair-weight-bytes": lambda: weight_bytes(folders["dense"], pair),
        "pair-least-blocks": lambda: least_blocks(folders["dense"], pair),
        "four-moe": lambda: compare(folders["moe"], four, seed=7),
        "four-dense": lambda: compare(folders["dense"], four, seed=7),
        "four-broken-rows": lambda: broken_rows(four),
        "four-fabric": lambda: fabric(four),
    }
    if place.rank < 3:
        cases["three-dense"] = lambda: compare(folders["three"], TensorParallel.of(three), seed=5)
    found = {name: case() for name, case in cases.items()}
    Path(document["found"], f"{place.rank}.json").write_text(json.dumps(found))
    leave_world()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
