"""Sampler: logits in, one token per row out. The reference every faster sampler is compared with.

Order of steps, as in vLLM: banned end tokens, repetition, frequency and presence penalty, temperature, min-p, top-k,
top-p, then argmax of what is left plus Gumbel noise (see `inference.noise`). Greedy rows stop after the penalties.

Each row's token depends on that row alone. Ties: the lowest token id wins a greedy argmax; top-k and top-p keep
every token that ties with the last one kept.

Under tensor parallel a rank has some columns of the logits; `inference.vocabulary` answers what concerns all of
them, and every rank must be given the same rows.

    B rows   R some of the rows   V vocabulary   C columns here: all of V unless it is partitioned
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from inference.noise import gumbel, noise_bits, noise_key
from inference.sampling import SamplingParams
from inference.sampling_needs import has_penalty
from inference.sequence import TokenLogprob
from inference.vocabulary import WholeVocabulary

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


def sample(
    logits_BC: Tensor, rows: Sequence[SamplerRow], vocabulary: WholeVocabulary | None = None
) -> Sampled:
    """Choose the next token of every row; `logits_BC` is not changed."""
    if logits_BC.shape[0] != len(rows):
        raise ValueError(f"{logits_BC.shape[0]} rows of logits for {len(rows)} rows; give one each")
    vocabulary = vocabulary or WholeVocabulary(logits_BC.shape[1])
    raw_BC = logits_BC.float()
    scores_BC = _penalised(raw_BC, rows, vocabulary)
    raw_best = best = vocabulary.best(raw_BC)
    if scores_BC is not raw_BC:
        best = vocabulary.best(scores_BC)
    chosen_B = best.token_B
    random_rows = [i for i, row in enumerate(rows) if not row.sampling.is_greedy]
    if random_rows:
        chosen_B[random_rows] = _draw(
            scores_BC[random_rows],
            best.value_B[random_rows],
            [rows[i] for i in random_rows],
            vocabulary,
        )
    # A NaN makes the best value NaN; a broken row must not pass for a token.
    is_whole_B = torch.isfinite(raw_best.value_B) & torch.isfinite(best.value_B)
    token_ids = torch.where(is_whole_B, chosen_B, NO_TOKEN).tolist()
    return Sampled(token_ids, _logprobs(raw_BC, rows, token_ids, vocabulary))


def _penalised(raw_BC: Tensor, rows: Sequence[SamplerRow], vocabulary: WholeVocabulary) -> Tensor:
    """Return scores after bans and penalties; a copy only if a row needs one."""
    scores_BC = raw_BC
    for i, row in enumerate(rows):
        banned = _banned_token_ids(row, vocabulary.size)
        if not banned and not has_penalty(row.sampling):
            continue
        if scores_BC is raw_BC:
            scores_BC = raw_BC.clone()
        banned_here = _here(banned, vocabulary.start, raw_BC.shape[1])
        if banned_here:
            scores_BC[i, banned_here] = -math.inf
        if has_penalty(row.sampling):
            _penalise(scores_BC[i], row, vocabulary.start)
    return scores_BC


def _here(token_ids: Sequence[int], start: int, num_columns: int) -> list[int]:
    """Return the columns of those tokens that have one here."""
    return [token_id - start for token_id in token_ids if 0 <= token_id - start < num_columns]


def _banned_token_ids(row: SamplerRow, vocab_size: int) -> list[int]:
    sampling = row.sampling
    if len(row.token_ids) >= sampling.min_tokens:
        return []
    enders = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        enders.update(row.end_token_ids)
    return sorted(token_id for token_id in enders if token_id < vocab_size)


def _penalise(scores_C: Tensor, row: SamplerRow, start: int) -> None:
    """Apply one row's penalties in place."""
    sampling, num_columns = row.sampling, scores_C.shape[0]

    def columns(token_ids: Sequence[int]) -> Tensor:
        here = _here(token_ids, start, num_columns)
        return torch.tensor(here, dtype=torch.int64, device=scores_C.device)

    completion = columns(row.token_ids)
    if sampling.repetition_penalty != 1.0:
        seen = torch.unique(torch.cat([columns(row.prompt_token_ids), completion]))
        values = scores_C[seen]
        # A tensor: divided by a number, CUDA multiplies by its reciprocal, which rounds otherwise.
        penalty = torch.full_like(values, sampling.repetition_penalty)
        scores_C[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if len(completion) and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.unique(completion, return_counts=True)
        scores_C[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def _draw(
    scores_RC: Tensor, best_R: Tensor, rows: Sequence[SamplerRow], vocabulary: WholeVocabulary
) -> Tensor:
    """Return one random token per row, [R]; `best_R` holds the rows' largest scores."""

    def column(of: Callable[[SamplingParams], float]) -> Tensor:
        return torch.tensor([of(row.sampling) for row in rows], device=scores_RC.device)[:, None]

    # The largest score is moved to 0 first, so that dividing by a tiny temperature cannot overflow it.
    scores_RC = scores_RC - best_R[:, None]
    scores_RC = scores_RC / column(lambda sampling: sampling.temperature)
    scores_RC = _keep_likely(scores_RC, rows, column, vocabulary)
    keys = [noise_key(row.draw_seed, len(row.token_ids)) for row in rows]
    bits_RC = noise_bits(keys, scores_RC.shape[1], scores_RC.device, start=vocabulary.start)
    return vocabulary.best(scores_RC + gumbel(bits_RC)).token_B


def _keep_likely(
    scores_RC: Tensor,
    rows: Sequence[SamplerRow],
    column: Callable[[Callable[[SamplingParams], float]], Tensor],
    vocabulary: WholeVocabulary,
) -> Tensor:
    """Return the scores with what min-p, top-k and top-p drop set to -inf; the best token always stays."""
    vocab_size = vocabulary.size
    if any(row.sampling.min_p > 0.0 for row in rows):
        floor_R1 = column(lambda s: math.log(s.min_p) if s.min_p > 0.0 else -math.inf)
        scores_RC = scores_RC.masked_fill(scores_RC < floor_R1, -math.inf)
    if not any(row.sampling.top_k or row.sampling.top_p < 1.0 for row in rows):
        return scores_RC
    sorted_RV = vocabulary.whole(scores_RC).sort(dim=-1, descending=True).values
    num_kept_R1 = column(lambda s: min(s.top_k or vocab_size, vocab_size)).long()
    floor_R1 = sorted_RV.gather(1, num_kept_R1 - 1)
    # Top-p counts the probability of what top-k left, most likely first.
    probs_RV = sorted_RV.masked_fill(sorted_RV < floor_R1, -math.inf).softmax(dim=-1)
    before_RV = probs_RV.cumsum(dim=-1) - probs_RV
    top_p_R1 = column(lambda s: s.top_p)
    is_kept_RV = (before_RV < top_p_R1) | (top_p_R1 >= 1.0)
    last_R1 = is_kept_RV.sum(dim=-1, keepdim=True).clamp(min=1) - 1
    floor_R1 = torch.maximum(floor_R1, sorted_RV.gather(1, last_R1))
    return scores_RC.masked_fill(scores_RC < floor_R1, -math.inf)


def _logprobs(
    raw_BC: Tensor,
    rows: Sequence[SamplerRow],
    token_ids: Sequence[int],
    vocabulary: WholeVocabulary,
) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        num_top = row.sampling.logprobs
        if num_top is None or token_ids[i] == NO_TOKEN:
            continue
        logprobs_C = vocabulary.log_softmax(raw_BC[i : i + 1])[0]
        pairs = vocabulary.top(logprobs_C, num_top)
        top = tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
        found[i] = TokenLogprob(token_ids[i], vocabulary.value_of(token_ids[i], logprobs_C), top)
    return found
