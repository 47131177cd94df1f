"""Sampler: logits in, one token per row out. The reference every faster sampler is compared with.

Order of steps, as in vLLM: banned end tokens, repetition, frequency and presence penalty, temperature, min-p, top-k,
top-p, then argmax of what is left plus Gumbel noise (see `inference.noise`). Greedy rows stop after the penalties.

Each row's token depends on that row alone. Ties: the lowest token id wins a greedy argmax; top-k and top-p keep
every token that ties with the last one kept.

    B rows   R some of the rows   V vocabulary
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from inference.noise import gumbel, noise_bits, noise_key
from inference.sampling import SamplingParams
from inference.sequence import TokenLogprob

NO_TOKEN = -1


@dataclass(slots=True, eq=False)
class SamplerRow:
    """What choosing one row's next token depends on, besides its logits."""

    sampling: SamplingParams
    draw_seed: int
    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int] = ()
    """The completion so far; its length is the position that is drawn."""

    end_token_ids: Collection[int] = field(default=frozenset())
    """Tokens that would end the sequence; banned below `min_tokens`."""


class Sampled(NamedTuple):
    """One chosen token per row."""

    token_ids: list[int]
    """`NO_TOKEN` where the row's logits hold NaN or +inf, or allow no token."""

    logprobs: list[TokenLogprob | None]
    """For rows that ask for them: of the model's own distribution, before penalties and temperature."""


def sample(logits_BV: Tensor, rows: Sequence[SamplerRow]) -> Sampled:
    """Choose the next token of every row; `logits_BV` is not changed."""
    if logits_BV.shape[0] != len(rows):
        raise ValueError(f"{logits_BV.shape[0]} rows of logits for {len(rows)} rows; give one each")
    raw_BV = logits_BV.float()
    scores_BV = _penalised(raw_BV, rows)
    chosen_B = torch.argmax(scores_BV, dim=-1)
    random_rows = [i for i, row in enumerate(rows) if not row.sampling.is_greedy]
    if random_rows:
        chosen_B[random_rows] = _draw(scores_BV[random_rows], [rows[i] for i in random_rows])
    # amax propagates NaN; a broken row must not pass for a token.
    is_whole_B = torch.isfinite(raw_BV.amax(dim=-1)) & torch.isfinite(scores_BV.amax(dim=-1))
    token_ids = torch.where(is_whole_B, chosen_B, NO_TOKEN).tolist()
    return Sampled(token_ids, _logprobs(raw_BV, rows, token_ids))


def _penalised(raw_BV: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """Return scores after bans and penalties; a copy only if a row needs one."""
    scores_BV = raw_BV
    for i, row in enumerate(rows):
        banned = _banned_token_ids(row, raw_BV.shape[1])
        if not banned and not _has_penalty(row.sampling):
            continue
        if scores_BV is raw_BV:
            scores_BV = raw_BV.clone()
        if banned:
            scores_BV[i, banned] = -math.inf
        if _has_penalty(row.sampling):
            _penalise(scores_BV[i], row)
    return scores_BV


def _banned_token_ids(row: SamplerRow, vocab_size: int) -> list[int]:
    sampling = row.sampling
    if len(row.token_ids) >= sampling.min_tokens:
        return []
    enders = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        enders.update(row.end_token_ids)
    return sorted(token_id for token_id in enders if token_id < vocab_size)


def _has_penalty(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def _penalise(scores_V: Tensor, row: SamplerRow) -> None:
    """Apply one row's penalties in place."""
    sampling, vocab_size = row.sampling, scores_V.shape[0]
    completion = torch.tensor(list(row.token_ids), dtype=torch.int64, device=scores_V.device)
    if sampling.repetition_penalty != 1.0:
        prompt = [token_id for token_id in row.prompt_token_ids if token_id < vocab_size]
        seen = torch.cat([torch.tensor(prompt, dtype=torch.int64).to(completion), completion])
        seen = torch.unique(seen)
        values = scores_V[seen]
        penalty = sampling.repetition_penalty
        scores_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if len(completion) and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.unique(completion, return_counts=True)
        scores_V[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def _draw(scores_RV: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """Return one random token per row, [R]."""

    def column(of: Callable[[SamplingParams], float]) -> Tensor:
        return torch.tensor([of(row.sampling) for row in rows], device=scores_RV.device)[:, None]

    # The largest score is moved to 0 first, so that dividing by a tiny temperature cannot overflow it.
    scores_RV = scores_RV - scores_RV.amax(dim=-1, keepdim=True)
    scores_RV = scores_RV / column(lambda sampling: sampling.temperature)
    scores_RV = _keep_likely(scores_RV, rows, column)
    keys = [noise_key(row.draw_seed, len(row.token_ids)) for row in rows]
    noise_RV = gumbel(noise_bits(keys, scores_RV.shape[1], scores_RV.device))
    return torch.argmax(scores_RV + noise_RV, dim=-1)


def _keep_likely(
    scores_RV: Tensor,
    rows: Sequence[SamplerRow],
    column: Callable[[Callable[[SamplingParams], float]], Tensor],
) -> Tensor:
    """Return the scores with what min-p, top-k and top-p drop set to -inf; the best token always stays."""
    vocab_size = scores_RV.shape[1]
    if any(row.sampling.min_p > 0.0 for row in rows):
        floor_R1 = column(lambda s: math.log(s.min_p) if s.min_p > 0.0 else -math.inf)
        scores_RV = scores_RV.masked_fill(scores_RV < floor_R1, -math.inf)
    if not any(row.sampling.top_k or row.sampling.top_p < 1.0 for row in rows):
        return scores_RV
    sorted_RV = scores_RV.sort(dim=-1, descending=True).values
    num_kept_R1 = column(lambda s: min(s.top_k or vocab_size, vocab_size)).long()
    floor_R1 = sorted_RV.gather(1, num_kept_R1 - 1)
    # Top-p counts the probability of what top-k left, most likely first.
    probs_RV = sorted_RV.masked_fill(sorted_RV < floor_R1, -math.inf).softmax(dim=-1)
    before_RV = probs_RV.cumsum(dim=-1) - probs_RV
    top_p_R1 = column(lambda s: s.top_p)
    is_kept_RV = (before_RV < top_p_R1) | (top_p_R1 >= 1.0)
    last_R1 = is_kept_RV.sum(dim=-1, keepdim=True).clamp(min=1) - 1
    floor_R1 = torch.maximum(floor_R1, sorted_RV.gather(1, last_R1))
    return scores_RV.masked_fill(scores_RV < floor_R1, -math.inf)


def _logprobs(
    raw_BV: Tensor, rows: Sequence[SamplerRow], token_ids: Sequence[int]
) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        num_top = row.sampling.logprobs
        if num_top is None or token_ids[i] == NO_TOKEN:
            continue
        logprobs_V = raw_BV[i].log_softmax(dim=-1)
        best = torch.topk(logprobs_V, min(num_top, len(logprobs_V)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
        found[i] = TokenLogprob(token_ids[i], float(logprobs_V[token_ids[i]]), top)
    return found
